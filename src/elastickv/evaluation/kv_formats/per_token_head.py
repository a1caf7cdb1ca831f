"""vLLM's formats of 8 and 4 bits: one scale for all, or one for every token and KV head.

vLLM 0.33, `vllm/v1/attention/ops/triton_reshape_and_cache_flash.py` and `int4_per_token_head.py`. Scales are float32. Without
scales in the checkpoint that of `fp8` is 1 (`vllm/model_executor/layers/quantization/kv_cache.py`); the calibrated one maps the
largest number of a layer's first tokens to 448.
"""

from collections.abc import Callable

from elastickv.evaluation.kv_formats.reference_format import ReferenceFormat, StoredPlane
from elastickv.evaluation.kv_formats.rotations import by_blocks, hadamard, random_signs
from elastickv.evaluation.kv_formats.rounding_modes import E4M3_MAX, half_away, to_e4m3
from elastickv.evaluation.prefill import Tensor
from elastickv.kvcache.hadamard import rotated_block

_SCALE_BYTES = 4
_LEAST_SCALE = 1e-6
_SOURCE = "vLLM 0.33, vllm/v1/attention/ops/triton_reshape_and_cache_flash.py"
_INT4_SOURCE = "vLLM 0.33, vllm/v1/attention/ops/int4_per_token_head.py"


def _fp8(x: Tensor) -> Tensor:
    scale = (x.abs().amax(-1, keepdim=True) / E4M3_MAX).clamp_min(_LEAST_SCALE)
    return to_e4m3(x / scale) * scale


def _int8(x: Tensor) -> Tensor:
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(_LEAST_SCALE)
    return half_away(x / scale).clamp(-128, 127) * scale


def _int4(x: Tensor) -> Tensor:
    """Round to 4 bits with an integer zero point; where zero is outside of the numbers' range, codes saturate."""
    low = x.amin(-1, keepdim=True)
    scale = ((x.amax(-1, keepdim=True) - low) / 15).clamp_min(_LEAST_SCALE)
    zero = half_away(-low / scale).clamp(0, 15)
    return (half_away(x / scale + zero).clamp(0, 15) - zero) * scale


def _int4_rotated(x: Tensor) -> Tensor:
    """Round after a randomized Hadamard transform: random signs, then Hadamard over the head."""
    size = rotated_block(x.shape[-1])
    signs = random_signs(size).to(x).repeat(x.shape[-1] // size)
    return by_blocks(_int4(by_blocks(x * signs, hadamard(size))), hadamard(size)) * signs


def _format(name: str, plane: StoredPlane, source: str) -> ReferenceFormat:
    return ReferenceFormat(name, plane, plane, source)


def _by_token(round_trip: Callable[[Tensor], Tensor], bits: int) -> StoredPlane:
    # The zero point of int4 lies in the four lowest bits of the scale.
    return StoredPlane(round_trip, lambda head_dim: -(-head_dim * bits // 8) + _SCALE_BYTES)


FP8_PER_TENSOR = _format(
    "fp8_per_tensor", StoredPlane(to_e4m3, lambda head_dim: head_dim), "vLLM 0.33, kv_cache_dtype fp8, scale 1"
)
_calibrated = StoredPlane(to_e4m3, lambda head_dim: head_dim, calibrated_to=E4M3_MAX)
FP8_PER_TENSOR_CALIBRATED = _format(
    "fp8_per_tensor_calibrated", _calibrated, "vLLM 0.33, kv_cache_dtype fp8, scales of the checkpoint"
)
FP8_PER_TOKEN_HEAD = _format("fp8_per_token_head", _by_token(_fp8, 8), _SOURCE)
INT8_PER_TOKEN_HEAD = _format("int8_per_token_head", _by_token(_int8, 8), _SOURCE)
INT4_PER_TOKEN_HEAD = _format("int4_per_token_head", _by_token(_int4_rotated, 4), _INT4_SOURCE)
INT4_PER_TOKEN_HEAD_UNROTATED = _format(
    "int4_per_token_head_unrotated", _by_token(_int4, 4), f"{_INT4_SOURCE}, without its rotation"
)
