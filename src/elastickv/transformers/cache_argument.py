"""The name of the cache argument in Transformers: `cache` from 5.24 on, `past_key_values` before."""

from collections.abc import Mapping
from typing import Any

from transformers.generation.utils import ALL_CACHE_NAMES

# Releases with the newer name also accept the older one, and warn.
_NAMES = ("cache", "past_key_values")
CACHE_ARGUMENT: str = next(name for name in _NAMES if name in ALL_CACHE_NAMES)


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among the arguments of `generate` or `forward`, under either name. None if there is none."""
    return next((arguments[name] for name in _NAMES if arguments.get(name) is not None), None)


def without_cache(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the other arguments."""
    return {name: value for name, value in arguments.items() if name not in _NAMES}
