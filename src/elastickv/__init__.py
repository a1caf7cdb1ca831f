"""ElasticKV: a byte budget for the KV cache of decoding language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from elastickv.version import __version__

_HOMES = {
    "AttentionShape": "elastickv.recipe",
    "Recipe": "elastickv.recipe",
    "UsageError": "elastickv.errors",
    "bench": "elastickv.api",
    "compare": "elastickv.api",
    "for_ratio": "elastickv.recipe",
    "load": "elastickv.api",
    "report": "elastickv.api",
    "sweep": "elastickv.api",
}
__all__ = ["AttentionShape", "Recipe", "UsageError", "__version__", "bench", "compare", "for_ratio", "load", "report", "sweep"]

if TYPE_CHECKING:
    from elastickv.api import bench, compare, load, report, sweep
    from elastickv.errors import UsageError
    from elastickv.recipe import AttentionShape, Recipe, for_ratio


def __getattr__(name: str) -> Any:
    """Import public names on first use: `import elastickv` must not pay for NumPy."""
    if name not in _HOMES:
        raise AttributeError(f"module 'elastickv' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
