"""What a `generate` is configured to do, resolved by Transformers from its arguments, a configuration and the model's own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from transformers import GenerationConfig

from elastickv.errors import UsageError

CONTINUOUS_BATCHING = "paged"
NO_WEIGHTS = (
    "output_attentions=True, and an ElasticCache returns no attention weights: drop it, or run the model without an elastic "
    "cache and with attn_implementation='eager'"
)

# What makes `generate` do something else than to choose a token a pass with the cache that is passed.
_PLAIN = {
    "use_cache": True,
    "cache_implementation": None,
    "cache_config": None,
    "num_beams": 1,
    "num_return_sequences": 1,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "guidance_scale": None,
    "return_dict_in_generate": False,
    "output_attentions": False,
    "stop_strings": None,
    "token_healing": False,
    "max_time": None,
}


@contextmanager
def plain_decoding(model: Any) -> Iterator[None]:
    """Let `generate` inside choose a token a pass with the cache that is passed, whatever the model's configuration says."""
    own = model.generation_config
    model.generation_config = copy.deepcopy(own)
    for name, value in _PLAIN.items():
        if hasattr(own, name):
            setattr(model.generation_config, name, value)
    try:
        yield
    finally:
        model.generation_config = own


def resolved_settings(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> GenerationConfig:
    """Return the configuration that `model.generate(*args, **kwargs)` will use."""
    others = dict(kwargs)
    config = others.pop("generation_config", None)
    if config is None:
        config = next((value for value in args if isinstance(value, GenerationConfig)), None)
    # The function that `generate` calls: it copies the configuration, and fills what is None from the model's own.
    settings: GenerationConfig = model._prepare_generation_config(config, **others)[0]
    return settings


def other_cache(settings: Any) -> str | None:
    """Return the setting that asks for another cache than Transformers' default one, or for none. None if there is none."""
    if not settings.use_cache:  # Transformers passes None on, and the model is then run without what it has cached.
        return f"use_cache={settings.use_cache}"
    if settings.cache_implementation is not None:
        return f"cache_implementation={settings.cache_implementation!r}"
    return None


def check_elastic(settings: Any) -> None:
    """Check that a `generate` with an ElasticCache is not configured for another cache, or for what the cache cannot return.

    Raises
    ------
    UsageError : naming the setting.
    """
    if settings.output_attentions:
        raise UsageError(NO_WEIGHTS)
    setting = other_cache(settings)
    if setting is not None:
        raise UsageError(
            f"{setting} is set (as an argument, in generation_config, or in model.generation_config) and an ElasticCache is "
            "passed: drop one of them"
        )


def check_supported(settings: Any) -> None:
    """Check that a `generate` without an ElasticCache can run while the model's attention is that of elastic caches.

    Raises
    ------
    UsageError : for continuous batching, which needs an attention implementation of its own.
    """
    if settings.cache_implementation == CONTINUOUS_BATCHING:
        raise UsageError(
            f"cache_implementation={CONTINUOUS_BATCHING!r} (continuous batching) does not work inside an ekv.elastic block: "
            "call it outside of the block"
        )


def planned_positions(caller: FrameType, held: int) -> tuple[int, int] | None:
    """Return how many positions the running `generate` will fill, and how many of them at least are padding in each row.

    Transformers does not pass this to a cache. Before the prompt, it reads the cache's length from a function that has the
    generation's configuration in a local variable. Reading it there refuses a prompt that will not fit before any work is
    done, and allows a single allocation. In releases without that function, the cache grows as tokens come.

    Parameters
    ----------
    caller : the frame that reads the cache's length.
    held : positions in the cache.

    Returns
    -------
    positions, padding : None if the caller is another function.

    Raises
    ------
    UsageError : if an elastic cache cannot serve the generation, or holds the prompt already.
    """
    if caller.f_code.co_name != "_prefill":
        return None
    known = caller.f_locals
    generation, inputs, kwargs = known.get("generation_config"), known.get("input_ids"), known.get("model_kwargs") or {}
    if generation is None or not isinstance(inputs, torch.Tensor):
        return None
    check_elastic(generation)
    if not isinstance(getattr(generation, "max_length", None), int):
        return None
    mask = kwargs.get("attention_mask")
    padding = int((mask == 0).sum(dim=1).min()) if isinstance(mask, torch.Tensor) and mask.dim() == 2 else 0
    covered = mask.shape[1] if isinstance(mask, torch.Tensor) else getattr(generation, "_mask_length", -1)
    positions = max(covered, inputs.shape[1])
    if held and covered == inputs.shape[1] and positions <= held:
        raise UsageError(
            f"the cache already holds {held} tokens and the prompt has {positions}: a later turn repeats the earlier text "
            "and adds to it; reset() the cache for another text"
        )
    # The last generated token is never passed to the model.
    return generation.max_length - inputs.shape[1] + positions - 1, padding
