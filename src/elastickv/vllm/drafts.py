"""Speculative decoding: which drafters are served, and what one with layers of its own asks of a step.

Configurations are read by the names of their attributes in vLLM 0.32 and 0.33. Nothing is imported from vLLM.
"""

from collections.abc import Iterator
from typing import Any

WITHOUT_LAYERS = ("ngram", "ngram_gpu", "suffix")
WITH_LAYERS = ("draft_model", "eagle", "eagle3", "mtp")


def draft_layers(vllm_config: Any) -> bool:
    """Whether the drafter has attention layers, whose caches are beside the model's."""
    return _method(vllm_config) in WITH_LAYERS


def extra_draft_tokens(vllm_config: Any) -> int:
    """Return by how many tokens a request's step of the drafter is longer than the model's.

    A draft model computes the accepted tokens and the newest one at once (vLLM's `StandaloneARSpeculator`); EAGLE and MTP
    compute the step's tokens, shifted by one.
    """
    return int(_method(vllm_config) == "draft_model")


def draft_refusals(vllm_config: Any) -> Iterator[str]:
    """Yield why a configuration's speculation cannot be served: one line for each reason."""
    method, speculation = _method(vllm_config), getattr(vllm_config, "speculative_config", None)
    if method is None or method in WITHOUT_LAYERS:
        return
    others = " or ".join(WITHOUT_LAYERS)
    if method not in WITH_LAYERS:
        yield f"speculation by {method} is not served: use the method {', '.join(WITH_LAYERS)}, {others}"
    elif not getattr(vllm_config, "use_v2_model_runner", False):
        yield (
            f"speculation by {method} needs vLLM's model runner V2, which serves on GPUs, and this engine has V1, whose drafts "
            f"have one cache where ElasticKV's layers have two: use the method {others}, or what vLLM's log names for V2"
        )
    elif getattr(speculation, "use_multi_module_mtp", bool)():
        count = vllm_config.speculative_config.num_speculative_tokens
        yield (
            f"speculation by {method} with num_speculative_tokens={count} runs one MTP module after the other, over tokens "
            "that a window no longer has: give num_speculative_tokens=1"
        )


def _method(vllm_config: Any) -> str | None:
    return getattr(getattr(vllm_config, "speculative_config", None), "method", None)
