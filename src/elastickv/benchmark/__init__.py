"""The paired micro-benchmark and the inference cycle: workload, contenders, sampler, statistics, result."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "PRESETS": "elastickv.benchmark.options",
    "Gate": "elastickv.benchmark.gate",
    "Options": "elastickv.benchmark.options",
    "Reporter": "elastickv.benchmark.reporter",
    "Result": "elastickv.benchmark.result",
    "run": "elastickv.benchmark.runner",
}
__all__ = ["PRESETS", "Gate", "Options", "Reporter", "Result", "run"]

if TYPE_CHECKING:
    from elastickv.benchmark.gate import Gate
    from elastickv.benchmark.options import PRESETS, Options
    from elastickv.benchmark.reporter import Reporter
    from elastickv.benchmark.result import Result
    from elastickv.benchmark.runner import run


def __getattr__(name: str) -> Any:
    """Import public names on first use: the command line reads the options and must not pay for NumPy."""
    if name not in _HOMES:
        raise AttributeError(f"module 'elastickv.benchmark' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
