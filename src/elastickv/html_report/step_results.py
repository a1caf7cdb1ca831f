"""Results of `bench` and of the original program as the page shows them."""

from typing import Any

from elastickv.benchmark.stats.intervals import LEVEL, SummaryStats, student_quantile
from elastickv.html_report.provenance import estimate, lines, provenance, reasons
from elastickv.html_report.report_data import ContenderTimes, IntervalEstimate, MemoryUse, PlottedPoint, RecipeError, Step
from elastickv.results.compare.runs import BenchmarkRun
from elastickv.results.documents import Document
from elastickv.results.readers import Reader

_MOVED = ("query", "output")  # itemised beside what counts into C


def step_of(document: Document, run: BenchmarkRun) -> Step:
    """Return a result of `bench`, or of the original program, whose `run` has been read.

    Raises
    ------
    UsageError : naming the file and what it lacks.
    """
    reader = Reader(document.source, document.value)
    cell = dict(run.cell.pairs)
    common: dict[str, Any] = {
        "context": cell["seq"],
        "batch": cell["batch"],
        "heads": cell["heads"],
        "kv_heads": cell["kv_heads"],
        "head_dim": cell["dim"],
        "cache": cell["cache"],
        "compress": reader.positive("configuration", "compression"),
        "requested": cell["recipe"],
        "recipe": run.recipe,
        "elastic_ms": run.figures["step"].mean_ms,
    }
    return _original(reader, run, common) if run.recipe is None else _own(reader, run, common)


def _own(reader: Reader, run: BenchmarkRun, common: dict[str, Any]) -> Step:
    samples = _series(reader, "samples")
    contenders = _contenders(reader, samples)
    baseline = reader.text("baseline", "name")
    return Step(
        provenance=provenance(reader, run.device, _warnings(reader)),
        **common,
        read=reader.positive("recipe", "ratio_read"),
        stored=reader.positive("recipe", "ratio_stored"),
        dense_ms=reader.positive("baseline", "time_ms"),
        baseline=baseline,
        speedup=estimate(reader, "speedup"),
        noise_floor=estimate(reader, "noise_floor"),
        faster=None if reader.optional("noise_floor") is None else bool(reader.at("faster")),
        error=_error(reader, run),
        cycle=_cycle(reader),
        contenders=contenders,
        roofline={name: _point(reader, name) for name in ("dense", "elastic")},
        read_gbs=reader.positive("ceilings", "read_gbs"),
        flops_gflops=reader.positive("ceilings", "flops_gflops"),
        memory=_memory(reader),
        samples_ms={baseline if name == "baseline" else name: series for name, series in samples.items()},
        token_ms=_tokens(reader, run),
        flagged=reader.optional("flagged_samples") or {},
    )


def _original(reader: Reader, run: BenchmarkRun, common: dict[str, Any]) -> Step:
    rate = reader.optional("results", "baseline_tokens_per_sec")
    speedup, cycle = (reader.optional(*path) for path in (("results", "speedup_vs_baseline"), ("inference_cycle",)))
    return Step(
        provenance=provenance(
            reader, run.device, ["written by the original program: no samples, no interval, a baseline of its own"]
        ),
        **common,
        read=None,
        stored=None,
        dense_ms=1e3 / reader.positive("results", "baseline_tokens_per_sec") if rate else None,
        baseline="the original program's own" if rate else None,
        speedup=None if speedup is None else IntervalEstimate(reader.positive("results", "speedup_vs_baseline")),
        noise_floor=None,
        faster=None,
        error=None,
        cycle=_cycle(reader) if isinstance(cycle, dict) and "speedup_vs_baseline" in cycle else None,
        contenders=(),
        roofline={},
        read_gbs=None,
        flops_gflops=None,
        memory=None,
        samples_ms={},
        token_ms={},
    )


def _series(reader: Reader, *path: str) -> dict[str, tuple[float, ...]]:
    found = reader.at(*path, kind=dict)
    return {str(name): reader.times(series, f"{'.'.join(path)}.{name}") for name, series in found.items()}


def _contenders(reader: Reader, samples: dict[str, tuple[float, ...]]) -> tuple[ContenderTimes, ...]:
    """Return every contender with the interval of its truncated mean (Tukey & McLaughlin 1963)."""
    truncate, baseline, found = reader.number("build", "truncate_percent"), reader.text("baseline", "name"), []
    for number, timing in enumerate(reader.at("contenders", kind=list)):
        if not isinstance(timing, dict):
            raise reader.refused(f"has no contender in contenders[{number}]")
        one = Reader(reader.source, timing)
        name, mean, std = one.text("name"), one.positive("time_ms"), one.number("time_std_ms")
        count = len(samples.get("baseline" if name == baseline else name, ()))
        time = IntervalEstimate(mean)
        if count > 1:
            error = SummaryStats(mean, std, count, truncate).relative_error * student_quantile(0.5 + LEVEL / 2, count - 1)
            time = IntervalEstimate(mean, mean * (1 - min(error, 0.999)), mean * (1 + error))
        found.append(ContenderTimes(name, one.text("kind"), one.text("dtype"), time))
    return tuple(found)


def _error(reader: Reader, run: BenchmarkRun) -> RecipeError | None:
    if run.fidelity is None:
        return None
    found = run.fidelity
    return RecipeError(reader.text("fidelity", "sample", "recipe"), found.measured_on, found.mean, found.p95, found.max)


def _cycle(reader: Reader) -> IntervalEstimate | None:
    if reader.optional("inference_cycle") is None:
        return None
    bounds = [reader.optional("inference_cycle", name) for name in ("speedup_low", "speedup_high")]
    known = all(isinstance(bound, (int, float)) for bound in bounds)
    return IntervalEstimate(reader.positive("inference_cycle", "speedup_vs_baseline"), *(bounds if known else ()))


def _tokens(reader: Reader, run: BenchmarkRun) -> dict[str, tuple[float, ...]]:
    if reader.optional("inference_cycle") is None:
        return {}
    path = ("inference_cycle", "raw_token_latencies_ms")
    return {
        str(name): tuple(token for one in rounds for token in reader.times(one, f"{'.'.join(path)}.{name}"))
        for name, rounds in reader.at(*path, kind=dict).items()
    }


def _point(reader: Reader, name: str) -> PlottedPoint:
    keys = ("intensity_flop_per_byte", "achieved_gflops", "score", "bandwidth_gbs")
    return PlottedPoint(*(reader.positive("roofline", name, key) for key in keys))


def _memory(reader: Reader) -> MemoryUse:
    parts = reader.at("recipe", "bytes_per_step", kind=dict)
    return MemoryUse(
        dense=reader.positive("recipe", "dense_bytes_per_step"),
        read={str(part): reader.number("recipe", "bytes_per_step", part) for part in parts if part not in _MOVED},
        largest_step=reader.number("recipe", "largest_step_bytes"),
        stored=reader.number("recipe", "stored_bytes"),
    )


def _warnings(reader: Reader) -> list[str]:
    """Return every caution of a result: its warnings hold the telemetry's flags and the peers that were not run."""
    verdict = reader.optional("verdict", "outcome")
    note, refused = reader.optional("telemetry", "note"), reader.optional("fidelity", "sample_refused")
    known = lines(reader, "warnings")
    joined = " ".join(known)
    more = [
        *lines(reader, "telemetry", "flags"),
        *(f"{name} was not measured: {why}" for name, why in reasons(reader, "baseline", "not_run").items()),
        *([f"telemetry: {note}"] if note else []),
        *([f"gate {reader.optional('verdict', 'gate')}: {verdict}"] if verdict not in (None, "pass") else []),
        *([str(refused)] if refused and str(refused) not in joined else []),
        *([] if reader.at("complete") else ["interrupted: incomplete"]),
    ]
    return [*known, *more]
