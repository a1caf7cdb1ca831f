"""vLLM's `turboquant_*`: keys rotated and rounded to a codebook, or e4m3; values uniform; the outer layers stay in 16 bit.

vLLM 0.33, `vllm/model_executor/layers/quantization/turboquant/config.py` and `vllm/v1/attention/ops/triton_turboquant_store.py`
and `triton_turboquant_decode.py`. The rotation is Hadamard's; keys have a float16 norm and are read with the rotated centroids
normalized again ("norm correction"); a token's values have a float16 scale and zero. The first and the last two layers are not
quantized, except in hybrids with state-space layers, where vLLM quantizes these too and this reference does not.
"""

from functools import partial

from elastickv.evaluation.kv_formats.reference_format import ReferenceFormat, StoredPlane
from elastickv.evaluation.kv_formats.rotations import by_blocks, hadamard
from elastickv.evaluation.kv_formats.rounding_modes import TINY, half_away, to_e4m3, to_half
from elastickv.evaluation.kv_formats.turboquant import to_centroids
from elastickv.evaluation.prefill import Tensor
from elastickv.kvcache.hadamard import rotated_block

_NORM_BYTES = 2
_SCALE_AND_ZERO_BYTES = 4
_FLOAT_BYTES = 4
_LEAST_SCALE = 1e-8
_OUTER_LAYERS = 2


def _keys(x: Tensor, bits: int) -> Tensor:
    rotation = hadamard(rotated_block(x.shape[-1]))
    norm = x.norm(dim=-1, keepdim=True)
    rounded = to_centroids(by_blocks(x / (norm + _LEAST_SCALE), rotation), bits)
    return to_half(norm) * by_blocks(rounded / rounded.norm(dim=-1, keepdim=True).clamp_min(TINY), rotation)


def _values(x: Tensor, bits: int) -> Tensor:
    zero = x.amin(-1, keepdim=True)
    scale = ((x.amax(-1, keepdim=True) - zero) / (2**bits - 1)).clamp_min(_LEAST_SCALE)
    return half_away((x - zero) / scale).clamp(0, 2**bits - 1) * to_half(scale) + to_half(zero)


def _codes(head_dim: int, bits: int) -> int:
    return -(-head_dim * bits // 8)


def _format(name: str, key_bits: int | None, value_bits: int) -> ReferenceFormat:
    """Return a preset; None bits of keys are e4m3."""
    values = StoredPlane(
        partial(_values, bits=value_bits), lambda head_dim: _codes(head_dim, value_bits) + _SCALE_AND_ZERO_BYTES
    )
    keys = StoredPlane(to_e4m3, lambda head_dim: head_dim)
    codebook = 0
    if key_bits is not None:
        bits, codebook = key_bits, _FLOAT_BYTES * 2**key_bits
        keys = StoredPlane(partial(_keys, bits=bits), lambda head_dim: _codes(head_dim, bits) + _NORM_BYTES)
    source = f"vLLM 0.33 {name}, outer {_OUTER_LAYERS} + {_OUTER_LAYERS} layers in 16 bit"
    return ReferenceFormat(name, keys, values, source, shared_bytes=lambda _: codebook, outer_layers=_OUTER_LAYERS)


TURBOQUANT_K8V4 = _format("turboquant_k8v4", None, 4)
TURBOQUANT_4BIT_NC = _format("turboquant_4bit_nc", 4, 4)
TURBOQUANT_K3V4_NC = _format("turboquant_k3v4_nc", 3, 4)
TURBOQUANT_3BIT_NC = _format("turboquant_3bit_nc", 3, 3)
