"""`elastickv.benchmark` under its former name."""

from elastickv.benchmark import PRESETS, Gate, Options, Reporter, Result, run

__all__ = ["PRESETS", "Gate", "Options", "Reporter", "Result", "run"]
