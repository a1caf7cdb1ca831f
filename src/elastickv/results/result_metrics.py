"""The metrics of a decode step's result: each once, with its label, its unit and where it comes from.

Every exporter goes through `METRICS`: rows (CSV, Markdown, data frames, sweeps, reports), the terminal's and the notebook's
table, and the page's table of results.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from elastickv.benchmark.result import Result


@dataclass(frozen=True)
class Metric:
    """One metric, or one property that identifies a result.

    Attributes
    ----------
    label : what tables for people call it.
    unit : of its values; empty where they have none.
    value : takes it from a result: a number, a text, a boolean, or None where it was not measured.
    summarized : whether tables for people state it in a column or sentence of its own; others are listed by their label.
    """

    label: str
    unit: str
    value: Callable[[Result], Any]
    summarized: bool = False

    @property
    def header(self) -> str:
        """The label with the unit."""
        return f"{self.label}, {self.unit}" if self.unit else self.label


def _summarized(label: str, unit: str, value: Callable[[Result], Any]) -> Metric:
    return Metric(label, unit, value, summarized=True)


METRICS: dict[str, Metric] = {
    "date_utc": _summarized("measured", "UTC", lambda r: r.date_utc),
    "device": _summarized("device", "", lambda r: r.gpu.name),
    "seq": _summarized("context", "tokens", lambda r: r.configuration.seq_len),
    "batch": _summarized("batch", "", lambda r: r.configuration.batch),
    "heads": _summarized("query heads", "", lambda r: r.configuration.heads),
    "kv_heads": _summarized("KV heads", "", lambda r: r.configuration.kv_heads),
    "head_dim": _summarized("head dimension", "", lambda r: r.configuration.head_dim),
    "compress": _summarized("C", "", lambda r: r.configuration.compression),
    "recipe": _summarized("recipe", "", lambda r: r.recipe.text),
    "recipe_hash": _summarized("recipe hash", "", lambda r: r.recipe.hash),
    "fallback": _summarized("fallback", "", lambda r: r.fallback),
    "ratio_read": _summarized("read 1/", "", lambda r: r.recipe.ratio_read),
    "ratio_stored": _summarized("stored 1/", "", lambda r: r.recipe.ratio_stored),
    "baseline": _summarized("dense is", "", lambda r: r.baseline.name),
    "baseline_ms": _summarized("dense", "ms", lambda r: r.baseline.time_ms),
    "elastic_ms": _summarized("elastic", "ms", lambda r: r.results.attention_time_ms),
    "speedup": _summarized("speed-up", "", lambda r: r.speedup.estimate),
    "speedup_low": _summarized("speed-up, lower bound", "", lambda r: r.speedup.low if r.speedup.is_shown else None),
    "speedup_high": _summarized("speed-up, upper bound", "", lambda r: r.speedup.high if r.speedup.is_shown else None),
    "cv": _summarized("coefficient of variation", "", lambda r: r.results.coefficient_of_variation),
    "bandwidth_gbs": _summarized("bandwidth", "GB/s", lambda r: r.results.memory_bandwidth_gbs),
    "roofline_score": _summarized("roofline score", "", lambda r: r.results.roofline_score),
    "kernel_error": _summarized("kernel error", "", lambda r: r.fidelity.sample and r.fidelity.sample.kernel_error.mean),
    "recipe_error": _summarized("recipe error", "", lambda r: r.fidelity.sample and r.fidelity.sample.recipe_error.mean),
    "cycle_speedup": _summarized("cycle", "", lambda r: r.inference_cycle and r.inference_cycle.speedup_vs_baseline),
    "reps": _summarized("samples", "", lambda r: r.convergence.rounds),
    "reps_requested": _summarized("samples requested", "", lambda r: r.configuration.reps),
    "left_out": _summarized("left out", "", lambda r: "; ".join(r.run_time.left_out) or None if r.run_time else None),
    "complete": _summarized("complete", "", lambda r: r.complete),
}


def listed_metrics() -> Iterator[tuple[str, Metric]]:
    """Yield the metrics that no column or sentence of its own states, by name."""
    yield from ((name, metric) for name, metric in METRICS.items() if not metric.summarized)
