"""ElasticKV: a byte budget for the KV cache of decoding language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "AttentionShape": "elastickv.recipe",
    "Recipe": "elastickv.recipe",
    "UsageError": "elastickv.errors",
    "compare": "elastickv.reports.comparison",
    "for_ratio": "elastickv.recipe",
    "report": "elastickv.reports.page.report",
    "sweep": "elastickv.sweeps.api",
}
__all__ = ["AttentionShape", "Recipe", "UsageError", "__version__", "compare", "for_ratio", "report", "sweep"]

if TYPE_CHECKING:
    from elastickv.errors import UsageError
    from elastickv.recipe import AttentionShape, Recipe, for_ratio
    from elastickv.reports.comparison import compare
    from elastickv.reports.page.report import report
    from elastickv.sweeps.api import sweep


def __getattr__(name: str) -> Any:
    """Import public names on first use: `import elastickv` must not pay for NumPy."""
    if name not in _HOMES:
        raise AttributeError(f"module 'elastickv' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
