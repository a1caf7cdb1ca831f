"""Whether keys are suited to a scale that all channels of a token or page share, from the keys alone."""

import numpy as np
from numpy.typing import NDArray

from elastickv.kvcache.quantize import stored_values
from elastickv.recipe.formats import FORMATS, PAGE_TOKENS, ScaleLayout

_LEAST_VARIANCE = 0.01  # of the channels' median: what channels that hardly vary lose does not count in full


def key_loss(keys: NDArray[np.float32], fmt: str) -> float:
    """Return the share of its variance over tokens that a channel of keys loses in a format, the mean over channels.

    A bias that all tokens have moves every score alike and counts as nothing, and so does the size of a channel.

    Parameters
    ----------
    keys : (tokens, head_dim) of one KV head, whole pages.
    fmt : name of a format.
    """
    variance = keys.astype(np.float64).var(axis=0)
    least = max(_LEAST_VARIANCE * float(np.median(variance)), float(np.finfo(np.float32).tiny))
    lost = np.square(stored_values(keys, fmt, False, keys.shape[-1]) - keys).mean(axis=0)
    return float((lost / np.maximum(variance, least)).mean())


def has_shared_scale(fmt: str) -> bool:
    """Return whether the channels of a key share a scale in a format."""
    return FORMATS[fmt].keys in (ScaleLayout.TOKEN, ScaleLayout.PAGE)


def unsuited_loss(keys: NDArray[np.float32], fmt: str, yardstick: str) -> tuple[float, float] | None:
    """Return what a format and a yardstick lose of the head that the format suits least, or None if it suits all heads.

    A format does not suit a head if it loses more than the yardstick.

    Parameters
    ----------
    keys : (kv_heads, tokens, head_dim), rounded to the 16 bits from which they are stored; only whole pages count.
    fmt : the format to judge. One without a shared scale suits all keys.
    yardstick : a format of fewer bits with scales of channels.
    """
    pages = keys.shape[1] // PAGE_TOKENS
    if not pages or not has_shared_scale(fmt):
        return None
    heads = keys[:, : pages * PAGE_TOKENS]
    losses = [(key_loss(head, fmt), key_loss(head, yardstick)) for head in heads if np.isfinite(head).all()]
    unsuited = [pair for pair in losses if pair[0] > pair[1]]
    return max(unsuited, default=None)
