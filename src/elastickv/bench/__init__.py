"""The paired micro-benchmark and the inference cycle: workload, contenders, sampler, statistics, result."""

from elastickv.bench.gate import Gate
from elastickv.bench.options import PRESETS, Options
from elastickv.bench.result import Result
from elastickv.bench.run import Reporter, run

__all__ = ["PRESETS", "Gate", "Options", "Reporter", "Result", "run"]
