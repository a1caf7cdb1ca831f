"""What a layer may be given and asked for; all else is refused before anything is stored."""

from __future__ import annotations

import torch

from elastickv.errors import UsageError
from elastickv.transformers.attention import Call
from elastickv.transformers.checks import NO_GRADIENT
from elastickv.transformers.layer_storage import dtype_name

_UNSUPPORTED = ("sliding_window", "position_bias", "block_table")


def check_tokens(
    keys: torch.Tensor, values: torch.Tensor, batch: int | None, stored: str | None, device: torch.device | None
) -> None:
    """Refuse new tokens that do not go with those before: kernels take addresses.

    Parameters
    ----------
    keys, values : (batch, kv_heads, new, head_dim).
    batch : sequences that are held; None for none yet.
    stored : the model's dtype when the store was filled; None for no store yet.
    device : where tokens are held; None for none yet.

    Raises
    ------
    UsageError : if sizes, dtype or device are others.
    """
    if keys.shape != values.shape:
        raise UsageError(
            f"keys of shape {tuple(keys.shape)} and values of shape {tuple(values.shape)}: ElasticCache serves keys and values "
            "of one size"
        )
    if batch is not None and keys.shape[0] != batch:
        raise UsageError(
            f"the cache holds {batch} sequences and {keys.shape[0]} are given: reset() it, make another, or "
            "batch_repeat_interleave() or batch_select_indices() it"
        )
    if device is not None and keys.device != device:
        raise UsageError(
            f"the cache lies on {device}, and keys on {keys.device} are given: reset() the cache, or move the model back"
        )
    if stored not in (None, "fp32", dtype_name(keys.dtype)):
        raise UsageError(
            f"the cache keeps {stored}, which the model had when it was filled, and keys of {keys.dtype} are given: reset() "
            "the cache, or give the model its dtype back"
        )


def check_call(call: Call, model: str, layer: int) -> None:
    """Refuse attention that no cache can serve.

    Raises
    ------
    UsageError : for gradients, dropout, windows and biases that came with the call, and attention to later tokens.
    """
    if torch.is_grad_enabled() and call.query.requires_grad:
        raise UsageError(NO_GRADIENT)
    if call.rest.get("dropout"):
        raise UsageError(f"{model} drops weights of its attention, which no cache does: call model.eval()")
    for word in _UNSUPPORTED:
        if call.rest.get(word) is not None:
            raise UsageError(f"{model}: layer {layer} attends with {word}, which is not supported")
    if getattr(call.module, "is_causal", True) is False or call.rest.get("is_causal") is False:
        raise UsageError(f"{model}: layer {layer} attends to later tokens, which no cache can hold")
