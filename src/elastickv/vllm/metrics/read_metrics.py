"""Counters of what decodes read, on their way from the scheduler to vLLM's metrics.

vLLM sends `SchedulerStats` to the front end, without attributes that it does not know. Its Prometheus logger hands the
performance statistics in them to a class of its own. So sums travel in the breakdown of bytes read of those statistics, which
vLLM shows in a debug log alone, and the class is ours.
"""

from dataclasses import replace
from typing import Any

from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.perf import DebugPerfStats, PerfMetricsProm, PerfStats
from vllm.v1.metrics.utils import create_metric_per_engine

from elastickv.vllm.metrics.decode_reads import COUNTERS, ReadTotals
from elastickv.vllm.serving_options import KEY, asks_for_pages


def attach(stats: Any, totals: ReadTotals) -> None:
    """Add sums to vLLM's `SchedulerStats`."""
    if not totals.tokens:
        return
    perf = stats.perf_stats or PerfStats()
    # vLLM expects every breakdown where there is one.
    debug = perf.debug_stats or DebugPerfStats(
        context_breakdown={},
        num_flops_per_gpu_breakdown={},
        num_read_bytes_per_gpu_breakdown={},
        num_write_bytes_per_gpu_breakdown={},
    )
    sums = {f"{KEY}_{name}": value for name, value in vars(totals).items()}
    breakdown = (debug.num_read_bytes_per_gpu_breakdown or {}) | sums
    stats.perf_stats = replace(perf, debug_stats=replace(debug, num_read_bytes_per_gpu_breakdown=breakdown))


def attached(perf_stats: Any) -> ReadTotals:
    """Return the sums in vLLM's `PerfStats`, zeros where there are none."""
    debug = perf_stats.debug_stats
    sums = (debug.num_read_bytes_per_gpu_breakdown or {}) if debug is not None else {}
    return ReadTotals(**{name: sums.get(f"{KEY}_{name}", 0) for name in COUNTERS})


class ReadMetrics(PerfMetricsProm):
    """vLLM's counters of performance, and ours of engines with ElasticKV."""

    def __init__(self, vllm_config: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]) -> None:
        super().__init__(vllm_config, labelnames, per_engine_labelvalues)
        self._reads: dict[str, Any] = {}
        if asks_for_pages(vllm_config):
            self._reads = {
                name: create_metric_per_engine(self._counter_cls(counter, what, labelnames=labelnames), per_engine_labelvalues)
                for name, (counter, what) in COUNTERS.items()
            }

    def observe(self, perf_stats: Any, engine_idx: int = 0) -> None:
        """Add what a step says."""
        super().observe(perf_stats, engine_idx)
        if self._reads:
            for name, value in vars(attached(perf_stats)).items():
                self._reads[name][engine_idx].inc(value)


def register_metrics() -> None:
    """Let vLLM's Prometheus loggers of this process have our counters; any number of times."""
    PrometheusStatLogger._perf_metrics_cls = ReadMetrics
