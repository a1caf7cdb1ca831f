"""ElasticKV in Hugging Face Transformers: `import elastickv.transformers as ekv`.

What is exported is imported when it is asked for: the command line looks for missing packages before torch is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastickv.transformers.attention import IMPLEMENTATION, register
    from elastickv.transformers.cache import ElasticCache
    from elastickv.transformers.context import Session, elastic
    from elastickv.transformers.decode.captured import NotCapturedWarning
    from elastickv.transformers.decode.seam import release
    from elastickv.transformers.plan import UncalibratedWarning
    from elastickv.transformers.report import CacheReport

__all__ = [
    "IMPLEMENTATION",
    "CacheReport",
    "ElasticCache",
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
    "NotCapturedWarning": "decode.captured",
    "Session": "context",
    "elastic": "context",
    "UncalibratedWarning": "plan",
    "CacheReport": "report",
    "release": "decode.seam",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from elastickv.transformers.models import NEEDED, require

    require(*NEEDED)
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
