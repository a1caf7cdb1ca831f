"""Keys in fp8 with a scale for each channel, for comparison with `int8_per_channel`: the same bytes, another grid.

A page of 32 tokens of one channel shares a float16 scale, max|x| / 448, as the rows of an fp8 weight matrix do (Micikevicius et
al. 2022, arXiv 2209.05433). The centered one stores the middle of the page's range beside it and rounds what differs from it,
max|x - middle| / 448. Values are those of `int8_per_token_head`.
"""

from elastickv.evaluation.kv_formats.per_token_head import INT8_PER_TOKEN_HEAD
from elastickv.evaluation.kv_formats.reference_format import ReferenceFormat, StoredPlane
from elastickv.evaluation.kv_formats.rounding_modes import E4M3_MAX, to_e4m3, to_half
from elastickv.evaluation.prefill import Tensor
from elastickv.recipe.regions import PAGE_TOKENS

_HALF_BYTES = 2
_LEAST_SCALE = 2.0**-24  # of float16
_SOURCE = "e4m3 with a scale a channel (arXiv 2209.05433)"


def _rounded(pages: Tensor) -> Tensor:
    scale = to_half((pages.abs().amax(-2, keepdim=True) / E4M3_MAX).clamp_min(_LEAST_SCALE))
    return to_e4m3(pages / scale) * scale


def _scaled(x: Tensor) -> Tensor:
    return _rounded(x.unflatten(-2, (-1, PAGE_TOKENS))).flatten(-3, -2)


def _centered(x: Tensor) -> Tensor:
    pages = x.unflatten(-2, (-1, PAGE_TOKENS))
    middle = to_half((pages.amax(-2, keepdim=True) + pages.amin(-2, keepdim=True)) / 2)
    return (_rounded(pages - middle) + middle).flatten(-3, -2)


def _format(name: str, centered: bool) -> ReferenceFormat:
    keys = StoredPlane(
        _centered if centered else _scaled,
        lambda head_dim: head_dim * (PAGE_TOKENS + (1 + centered) * _HALF_BYTES),
        group=PAGE_TOKENS,
        window=1,
    )
    source = f"{_SOURCE}, of what differs from the middle of its range" if centered else _SOURCE
    return ReferenceFormat(name, keys, INT8_PER_TOKEN_HEAD.values, source)


FP8_PER_CHANNEL = _format("fp8_per_channel", centered=False)
FP8_PER_CHANNEL_CENTERED = _format("fp8_per_channel_centered", centered=True)
