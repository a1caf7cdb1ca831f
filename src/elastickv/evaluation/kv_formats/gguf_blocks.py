"""llama.cpp's q8_0 and q4_0: 32 channels of a token share one float16 scale.

ggml-org/llama.cpp, `ggml/src/ggml-quants.c` (`quantize_row_q8_0_ref`, `quantize_row_q4_0_ref`). The rotated ones are what its
quantized KV caches do by default where a head is a multiple of 64 channels (pull request 21038, `src/llama-kv-cache.cpp`): a
Walsh-Hadamard matrix over the largest power of 2 that divides K's head, and over 64 channels of V.
"""

from collections.abc import Callable

from elastickv.evaluation.kv_formats.reference_format import ReferenceFormat, StoredPlane
from elastickv.evaluation.kv_formats.rotations import by_blocks, hadamard
from elastickv.evaluation.kv_formats.rounding_modes import half_away, to_half
from elastickv.evaluation.prefill import Tensor
from elastickv.kvcache.hadamard import rotated_block

BLOCK = 32
_ROTATED = 64
_SCALE_BYTES = 2
_SOURCE = "llama.cpp, ggml/src/ggml-quants.c"
_ROTATION = "llama.cpp, pull request 21038, src/llama-kv-cache.cpp"


def _q8_0(x: Tensor) -> Tensor:
    blocks = x.unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return (half_away(_over(blocks, scale)) * to_half(scale)).flatten(-2)


def _q4_0(x: Tensor) -> Tensor:
    """Round to codes -8 to 7 with the scale at which the number of largest magnitude, the first of them, has code -8."""
    blocks = x.unflatten(-1, (-1, BLOCK))
    scale = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8
    codes = (_over(blocks, scale) + 8.5).trunc().clamp_max(15) - 8
    return (codes * to_half(scale)).flatten(-2)


def _over(blocks: Tensor, scale: Tensor) -> Tensor:
    return (blocks / scale).where(scale != 0, 0)


def _rotated(round_trip: Callable[[Tensor], Tensor], of_keys: bool) -> Callable[[Tensor], Tensor]:
    def rotated(x: Tensor) -> Tensor:
        matrix = hadamard(rotated_block(x.shape[-1]) if of_keys else _ROTATED)
        return by_blocks(round_trip(by_blocks(x, matrix)), matrix)

    return rotated


def _format(name: str, round_trip: Callable[[Tensor], Tensor], bits: int) -> tuple[ReferenceFormat, ReferenceFormat]:
    """Return the format without and with rotation."""

    def head_bytes(head_dim: int) -> int:
        return head_dim // BLOCK * (BLOCK * bits // 8 + _SCALE_BYTES)

    plain = StoredPlane(round_trip, head_bytes, channels=BLOCK)
    keys, values = (StoredPlane(_rotated(round_trip, of_keys), head_bytes, channels=_ROTATED) for of_keys in (True, False))
    return ReferenceFormat(name, plain, plain, _SOURCE), ReferenceFormat(f"{name}_rotated", keys, values, _ROTATION)


Q8_0, Q8_0_ROTATED = _format("q8_0", _q8_0, 8)
Q4_0, Q4_0_ROTATED = _format("q4_0", _q4_0, 4)
