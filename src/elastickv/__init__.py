"""ElasticKV: a byte budget for the KV cache of decoding language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "AttentionShape": "elastickv.recipe",
    "Recipe": "elastickv.recipe",
    "UsageError": "elastickv.errors",
    "bench": "elastickv.api",
    "compare": "elastickv.results.compare.comparison",
    "for_ratio": "elastickv.recipe",
    "load": "elastickv.api",
    "report": "elastickv.html_report.report",
    "sweep": "elastickv.sweeps.sweep",
}
__all__ = ["AttentionShape", "Recipe", "UsageError", "__version__", "bench", "compare", "for_ratio", "load", "report", "sweep"]

if TYPE_CHECKING:
    from elastickv.api import bench, load
    from elastickv.errors import UsageError
    from elastickv.html_report.report import report
    from elastickv.recipe import AttentionShape, Recipe, for_ratio
    from elastickv.results.compare.comparison import compare
    from elastickv.sweeps.sweep import sweep


def __getattr__(name: str) -> Any:
    """Import public names on first use: `import elastickv` must not pay for NumPy."""
    if name not in _HOMES:
        raise AttributeError(f"module 'elastickv' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
