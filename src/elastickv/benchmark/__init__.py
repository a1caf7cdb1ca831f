"""The paired micro-benchmark and the inference cycle: workload, contenders, sampler, statistics, result."""

from elastickv.benchmark.gate import Gate
from elastickv.benchmark.options import PRESETS, Options
from elastickv.benchmark.result import Result
from elastickv.benchmark.runner import Reporter, run

__all__ = ["PRESETS", "Gate", "Options", "Reporter", "Result", "run"]
