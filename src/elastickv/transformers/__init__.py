"""ElasticKV in Hugging Face Transformers: `import elastickv.transformers as ekv`.

Exports are imported on first use, because the command line checks for missing packages before torch is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastickv.transformers.attention import IMPLEMENTATION, register
    from elastickv.transformers.cache import ElasticCache
    from elastickv.transformers.cache_report import CacheReport
    from elastickv.transformers.config import KeyFormatWarning, UncalibratedWarning
    from elastickv.transformers.context_manager import Session, elastic
    from elastickv.transformers.cuda_graph.captured import NotCapturedWarning
    from elastickv.transformers.cuda_graph.model_patch import release

__all__ = [
    "IMPLEMENTATION",
    "CacheReport",
    "ElasticCache",
    "KeyFormatWarning",
    "NotCapturedWarning",
    "Session",
    "UncalibratedWarning",
    "elastic",
    "register",
    "release",
]

_HOMES = {
    "IMPLEMENTATION": "attention",
    "register": "attention",
    "ElasticCache": "cache",
    "NotCapturedWarning": "cuda_graph.captured",
    "Session": "context_manager",
    "elastic": "context_manager",
    "KeyFormatWarning": "config",
    "UncalibratedWarning": "config",
    "CacheReport": "cache_report",
    "release": "cuda_graph.model_patch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from elastickv.transformers.model_loading import NEEDED, require

    require(*NEEDED)
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
