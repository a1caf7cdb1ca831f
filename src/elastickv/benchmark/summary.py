"""From samples to a result."""

from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

from elastickv.backends import Backend, Ceilings
from elastickv.benchmark.contenders import Contender
from elastickv.benchmark.gate import Verdict, judge
from elastickv.benchmark.options import Options
from elastickv.benchmark.prepare import ContenderSet
from elastickv.benchmark.result import (
    SCHEMA_VERSION,
    Baseline,
    Build,
    Configuration,
    Convergence,
    Gpu,
    InferenceCycle,
    RecipeErrors,
    RecipeUsed,
    Repetitions,
    Result,
    Results,
    RunTime,
    Timing,
)
from elastickv.benchmark.roofline import RooflinePoint, attention_flops, roofline_point
from elastickv.benchmark.sampler import Samples
from elastickv.benchmark.sequential_decode import CycleSamples
from elastickv.benchmark.stats.intervals import Interval, beyond_noise, ratio_interval, truncated
from elastickv.benchmark.telemetry import Telemetry
from elastickv.benchmark.warnings import collect_warnings
from elastickv.recipe import (
    DENSE,
    Recipe,
    dense_bytes,
    interval_bytes,
    largest_ratio_scoring_every_step,
    largest_step_bytes,
    predicted_loss,
    read_ratio,
    stored_bytes,
    stored_ratio,
)

CONVERGED_PERCENT = 1.0
AA_BASELINE = "baseline-again"


def speedup_interval(samples: Samples, options: Options) -> Interval:
    """Return dense time / elastic time."""
    times = samples.times
    return ratio_interval(times["baseline"], times["elastic"], paired=options.paired)


def noise_floor_interval(samples: Samples, options: Options) -> Interval | None:
    """Return dense time / dense time: what this machine's noise alone looks like; None where it was not measured twice."""
    times = samples.times
    if len(times[AA_BASELINE]) < 2:
        return None
    return ratio_interval(times["baseline"], times[AA_BASELINE], paired=options.paired)


class Summary:
    """Turns what was measured into a `Result`."""

    def __init__(
        self,
        options: Options,
        backend: Backend,
        field: ContenderSet,
        ceilings: Ceilings,
        samples: Samples,
        cycle: CycleSamples | None,
        complete: bool,
        run_time: RunTime,
    ) -> None:
        self.options, self.device, self.recipe, self.field = options, backend.device, field.recipe, field
        self.ceilings, self.samples, self.cycle, self.complete = ceilings, samples, cycle, complete
        self.run_time = run_time
        self.lengths = [options.seq] * options.batch
        self.speedup, self.noise_floor = speedup_interval(samples, options), noise_floor_interval(samples, options)
        theoretical = self.device.theoretical_bw_gbs
        self.reference_gbs = theoretical or ceilings.read_gbs
        self.reference = "theoretical" if theoretical else "measured read ceiling"

    def result(
        self, fidelity: RecipeErrors, telemetry: Telemetry, environment: dict[str, Any], skip_reason: str | None
    ) -> Result:
        """Return the result; `skip_reason` says why a faster device was not used."""
        options = self.options
        elastic, baseline = self._point("elastic"), self._point("baseline")
        converged = self.speedup.half_width * 100 <= (options.until_ci_percent or CONVERGED_PERCENT)
        figures = self._results(elastic)
        used = [self.field.baseline, self.field.elastic]
        result = Result(
            benchmark_type="elastic_kv_cache",
            brand="ElasticKV",
            build=Build(
                all(c.captured for c in used),
                self.field.elastic.rotation.steps,
                options.truncate,
                options.inner_loops,
                self.field.elastic.nodes,
                self.field.elastic.kernels_per_step,
            ),
            gpu=self._gpu(),
            configuration=self._configuration(),
            results=figures,
            inference_cycle=self._cycle(),
            schema_version=SCHEMA_VERSION,
            date_utc=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            complete=self.complete,
            recipe=self._recipe(),
            baseline=Baseline(
                self.field.baseline.name,
                self.field.baseline.version,
                self._mean("baseline"),
                baseline.bandwidth_gbs,
                100 * baseline.bandwidth_gbs / self.reference_gbs,
                self.field.candidates_ms,
                self.field.not_run,
                self.field.baseline.dtype,
                self.field.baseline_reason,
                list(self.field.compared),
            ),
            contenders=self._timings(),
            speedup=self.speedup,
            pairing="abba" if options.paired else "sequential",
            faster=beyond_noise(self.speedup, self.noise_floor),
            noise_floor=self.noise_floor,
            ceilings={
                "read_gbs": self.ceilings.read_gbs,
                "copy_gbs": self.ceilings.copy_gbs,
                "flops_gflops": self.ceilings.flops / 1e9,
            },
            roofline={"dense": baseline, "elastic": elastic},
            fidelity=fidelity,
            convergence=Convergence(
                converged,
                100 * self.speedup.half_width,
                options.until_ci_percent or CONVERGED_PERCENT,
                self.samples.stopped_by,
                self.samples.rounds,
            ),
            telemetry=telemetry.record(),
            environment=environment,
            verdict=self._verdict(fidelity),
            warnings=[text for text in (skip_reason and f"the CPU was measured: {skip_reason}", self.field.fallback) if text],
            repetitions=Repetitions(options.reps, self.samples.rounds, options.warmup, self.samples.warmup),
            run_time=self.run_time,
            samples=self.samples.times,
            sample_order=self.samples.order,
            flagged_samples=self.samples.flagged,
        )
        return replace(result, warnings=[*result.warnings, *collect_warnings(result)])

    def _mean(self, name: str) -> float:
        return float(truncated(self.samples.times[name], self.options.truncate).mean())

    def _std(self, name: str) -> float:
        times = truncated(self.samples.times[name], self.options.truncate)
        return float(times.std(ddof=1)) if len(times) > 1 else 0.0

    def _moved(self, contender: Contender, recipe: Recipe, dtype: str) -> float:
        if contender.kind == "peer":
            extra = interval_bytes(DENSE, self.lengths, self.options.shape, "bf16")
            return contender.kv_bytes + extra.query + extra.output
        return interval_bytes(recipe, self.lengths, self.options.shape, dtype).moved

    def _point(self, name: str) -> RooflinePoint:
        elastic = name == "elastic"
        contender = self.field.elastic if elastic else self.field.baseline
        recipe = self.recipe if elastic else DENSE
        moved = self._moved(contender, recipe, self.field.dtype if elastic else contender.dtype)
        flops = attention_flops(recipe, self.lengths, self.options.shape)
        return roofline_point(self._mean(name) / 1e3, moved, flops, self.ceilings)

    def _gpu(self) -> Gpu:
        d = self.device
        return Gpu(
            d.name, d.sm, d.theoretical_bw_gbs, d.kind, d.compute_units, d.last_level_cache_bytes, d.memory_bytes, d.driver
        )

    def _configuration(self) -> Configuration:
        o = self.options
        return Configuration(
            seq_len=o.seq,
            heads=o.heads,
            head_dim=o.dim,
            compression=int(o.compress) if o.compress == int(o.compress) else o.compress,
            reps=o.reps,
            warmup=o.warmup,
            batch=o.batch,
            kv_heads=o.shape.kv_heads,
            dtype=o.dtype,
            seed=o.seed,
            paired_baseline=o.paired,
            cache=o.cache,
            time_limit_s=o.time_limit_s,
            until_ci_percent=o.until_ci_percent,
            command=list(o.command),
            dense=o.dense,
        )

    def _results(self, point: RooflinePoint) -> Results:
        mean, std = self._mean("elastic"), self._std("elastic")
        return Results(
            attention_time_ms=mean,
            attention_time_std=std,
            coefficient_of_variation=std / mean,
            tokens_per_sec=self.options.batch / mean * 1e3,
            baseline_tokens_per_sec=self.options.batch / self._mean("baseline") * 1e3,
            speedup_vs_baseline=self.speedup.estimate,
            memory_bandwidth_gbs=point.bandwidth_gbs,
            memory_efficiency_percent=100 * point.bandwidth_gbs / self.reference_gbs,
            roofline_score=point.score,
            memory_efficiency_reference=self.reference,
        )

    def _recipe(self) -> RecipeUsed:
        recipe, shape, dtype = self.recipe, self.options.shape, self.field.dtype
        step = interval_bytes(recipe, self.lengths, shape, dtype)
        most = largest_ratio_scoring_every_step(self.options.seq, shape, dtype, recipe.sinks, recipe.window)
        return RecipeUsed(
            text=str(recipe),
            hash=recipe.hash,
            requested=self.options.recipe,
            ratio_read=read_ratio(recipe, self.lengths, shape, dtype),
            ratio_stored=stored_ratio(recipe, self.lengths, shape, dtype),
            dense_bytes_per_step=dense_bytes(self.lengths, shape),
            bytes_per_step={
                "codes": step.codes,
                "scales": step.scales,
                "scoring": step.scoring,
                "lists": step.lists,
                "exact": step.exact,
                "cached": step.cached,
                "query": step.query,
                "output": step.output,
            },
            largest_step_bytes=largest_step_bytes(recipe, self.lengths, shape, dtype).kv,
            stored_bytes=stored_bytes(recipe, self.lengths, shape, dtype),
            predicted_loss=predicted_loss(recipe, shape.head_dim),
            largest_ratio_scoring_every_step=most if recipe.selection == "pages" else None,
            fallback=self.field.fallback,
        )

    def _timings(self) -> list[Timing]:
        field = self.field
        entrants = {"baseline": field.baseline, "elastic": field.elastic, field.own_dense.name: field.own_dense}
        entrants |= {peer.name: peer for peer in field.peers}
        timings = []
        for name, c in entrants.items():
            if not self.samples.times.get(name):
                continue
            mean, std, rotation = self._mean(name), self._std(name), c.rotation
            timings.append(
                Timing(
                    name=c.name,
                    kind=c.kind,
                    version=c.version,
                    dtype=c.dtype,
                    time_ms=mean,
                    time_std_ms=std,
                    coefficient_of_variation=std / mean,
                    kv_bandwidth_gbs=c.kv_bytes / mean / 1e6,
                    copies=rotation.copies,
                    steps_per_sample=rotation.steps,
                    touched_bytes=rotation.touched_bytes,
                    cold=rotation.cold,
                    captured=c.captured,
                    graph_nodes=c.nodes,
                )
            )
        return timings

    def _cycle(self) -> InferenceCycle | None:
        cycle, tokens = self.cycle, self.options.decode_tokens
        if cycle is None or not len(cycle.latencies["elastic"]):
            return None
        raw = {name: cycle.total_ms(name) for name in ("dense", "elastic")}
        per_layer = {name: total / cycle.layers for name, total in raw.items()}
        rate = {name: self.options.batch * tokens / total * 1e3 for name, total in per_layer.items()}
        captured, nodes = cycle.programs["elastic"]
        return InferenceCycle(
            decode_tokens=tokens,
            baseline_total_ms=per_layer["dense"],
            elastic_total_ms=per_layer["elastic"],
            baseline_tokens_per_sec=rate["dense"],
            elastic_tokens_per_sec=rate["elastic"],
            speedup_vs_baseline=cycle.speedup.estimate if cycle.speedup else raw["dense"] / raw["elastic"],
            speedup_low=cycle.speedup.low if cycle.speedup else None,
            speedup_high=cycle.speedup.high if cycle.speedup else None,
            layers=cycle.layers,
            raw_token_latencies_ms={name: rows.tolist() for name, rows in cycle.latencies.items()},
            rounds=len(cycle.latencies["elastic"]),
            baseline_name=self.field.own_dense.name,
            raw_baseline_total_ms=raw["dense"],
            raw_elastic_total_ms=raw["elastic"],
            baseline_token_latency_ms=cycle.quantiles("dense"),
            elastic_token_latency_ms=cycle.quantiles("elastic"),
            cuda_graphs=captured,
            graph_nodes=nodes,
            kernel_nodes_per_layer_step=None if nodes is None else nodes / cycle.layers,
            anchor_phases=cycle.phases,
        )

    def _verdict(self, fidelity: RecipeErrors) -> Verdict | None:
        if self.options.gate is None:
            return None

        def exactly(value: float) -> tuple[float, float]:
            return value, value

        elastic, baseline = self._point("elastic"), self._point("baseline")
        error = fidelity.sample.recipe_error.mean if fidelity.sample else None
        # In a hot run the data sits in a cache: figures that relate to memory say nothing.
        cold = self.options.cache == "cold"
        figures: dict[str, tuple[float, float] | None] = {
            "speedup": (self.speedup.low, self.speedup.high),
            "cv": exactly(100 * self._std("elastic") / self._mean("elastic")),
            "efficiency": exactly(100 * baseline.bandwidth_gbs / self.reference_gbs) if cold else None,
            "roofline": exactly(elastic.score) if cold else None,
            "recipe_error": None if error is None else exactly(error),
        }
        return judge(self.options.gate, figures, self.complete)
