"""The paired micro-benchmark and the inference cycle: workload, contenders, sampler, statistics, result."""

from elastickv.measure.gate import Gate
from elastickv.measure.options import PRESETS, Options
from elastickv.measure.result import Result
from elastickv.measure.run import Reporter, run

__all__ = ["PRESETS", "Gate", "Options", "Reporter", "Result", "run"]
