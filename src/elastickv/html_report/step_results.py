"""Results of `bench` and of the original program as the page shows them."""

from collections.abc import Iterator
from typing import Any

from elastickv.benchmark.result import InferenceCycle, Result, Timing
from elastickv.benchmark.stats.intervals import LEAST_PAIRS, LEVEL, Interval, SummaryStats, student_quantile
from elastickv.html_report.provenance import provenance
from elastickv.html_report.report_data import ContenderTime, IntervalEstimate, Step
from elastickv.results.compare.runs import BenchmarkRun
from elastickv.results.kinds.original_result import OriginalCycle, OriginalResult


def step_of(run: BenchmarkRun) -> Step:
    """Return a decode step of `bench` or of the original program."""
    cell = dict(run.cell.pairs)
    common: dict[str, Any] = {
        "result": run.result,
        "context": cell["seq"],
        "batch": cell["batch"],
        "heads": cell["heads"],
        "kv_heads": cell["kv_heads"],
        "head_dim": cell["dim"],
        "cache": cell["cache"],
        "compress": cell["compress"],
        "requested": cell["recipe"],
        "recipe": run.recipe,
        "elastic_ms": run.figures["step"].mean_ms,
        "method": run.method | {"dtype": cell["dtype"], "schema": getattr(run.result, "schema_version", None)},
    }
    if isinstance(run.result, OriginalResult):
        return _original(run.result, run, common)
    return _bench(run.result, run, common)


def _bench(result: Result, run: BenchmarkRun, common: dict[str, Any]) -> Step:
    baseline, cycle = result.baseline.name, result.inference_cycle
    return Step(
        provenance=provenance(
            run.source,
            run.device,
            result.environment,
            _warnings(result),
            date=result.date_utc,
            command=result.configuration.command,
            driver=result.gpu.driver,
            compute_capability=result.gpu.sm,
        ),
        **common,
        read=result.recipe.ratio_read,
        stored=result.recipe.ratio_stored,
        dense_ms=result.baseline.time_ms,
        baseline=baseline,
        speedup=interval_of(result.speedup),
        noise_floor=interval_of(result.noise_floor),
        faster=None if result.noise_floor is None else result.faster,
        error=run.fidelity,
        error_recipe=result.fidelity.sample.recipe if result.fidelity.sample else None,
        cycle=None if cycle is None else _cycle(cycle),
        contenders=tuple(_contender(result, timing) for timing in result.contenders),
        roofline=result.roofline,
        read_gbs=result.ceilings["read_gbs"],
        flops_gflops=result.ceilings["flops_gflops"],
        memory=result.recipe,
        samples_ms={baseline if name == "baseline" else name: series for name, series in result.samples.items()},
        token_ms={
            name: [token for tokens in rounds for token in tokens] for name, rounds in cycle.raw_token_latencies_ms.items()
        }
        if cycle
        else {},
        flagged=result.flagged_samples,
    )


def _original(result: OriginalResult, run: BenchmarkRun, common: dict[str, Any]) -> Step:
    rate, speedup, cycle = result.results.baseline_tokens_per_sec, result.results.speedup_vs_baseline, result.inference_cycle
    warning = "written by the original program: no samples, no interval, a baseline of its own"
    return Step(
        provenance=provenance(run.source, run.device, {}, [warning]),
        **common,
        read=None,
        stored=None,
        dense_ms=1e3 / rate if rate else None,
        baseline="the original program's own" if rate else None,
        speedup=None if speedup is None else IntervalEstimate(speedup),
        noise_floor=None,
        faster=None,
        error=None,
        error_recipe=None,
        cycle=_cycle(cycle) if cycle is not None and cycle.speedup_vs_baseline is not None else None,
        contenders=(),
        roofline={},
        read_gbs=None,
        flops_gflops=None,
        memory=None,
        samples_ms={},
        token_ms={},
    )


def interval_of(interval: Interval | None) -> IntervalEstimate | None:
    """Return the interval of a time or of a ratio of times, without bounds where too few pairs make none.

    None where it was not measured.
    """
    if interval is None:
        return None
    bounds = (interval.low, interval.high) if interval.is_shown else (None, None)
    return IntervalEstimate(interval.estimate, *bounds)


def _contender(result: Result, timing: Timing) -> ContenderTime:
    """Return a contender with the interval of its truncated mean (Tukey & McLaughlin 1963)."""
    mean, time = timing.time_ms, IntervalEstimate(timing.time_ms)
    count = len(result.samples.get("baseline" if timing.name == result.baseline.name else timing.name, ()))
    if count >= LEAST_PAIRS:
        spread = SummaryStats(mean, timing.time_std_ms, count, result.build.truncate_percent)
        error = spread.relative_error * student_quantile(0.5 + LEVEL / 2, count - 1)
        time = IntervalEstimate(mean, mean * (1 - min(error, 0.999)), mean * (1 + error))
    return ContenderTime(timing, time)


def _cycle(cycle: InferenceCycle | OriginalCycle) -> IntervalEstimate:
    low, high = cycle.speedup_low, cycle.speedup_high
    if isinstance(cycle, InferenceCycle) and cycle.rounds < LEAST_PAIRS:
        low = None
    return IntervalEstimate(cycle.speedup_vs_baseline or 0.0, *((low, high) if low is not None and high is not None else ()))


def _warnings(result: Result) -> Iterator[str]:
    """Yield every warning of a result: its own, the telemetry's flags, peers that were not run, a gate that was missed."""
    yield from result.warnings
    flags, note = result.telemetry.get("flags"), result.telemetry.get("note")
    yield from map(str, flags if isinstance(flags, list) else ())
    yield from (f"{name} was not measured: {why}" for name, why in result.baseline.not_run.items())
    if note:
        yield f"telemetry: {note}"
    if result.verdict and result.verdict.outcome != "pass":
        yield f"gate {result.verdict.gate}: {result.verdict.outcome}"
    refused = result.fidelity.sample_refused
    if refused and refused not in " ".join(result.warnings):
        yield refused
    if not result.complete:
        yield "interrupted: incomplete"
