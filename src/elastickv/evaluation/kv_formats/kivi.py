"""KIVI: keys per channel over 32 tokens, values per token over 32 channels, asymmetric, with a window of 16-bit tokens.

Liu et al. 2024 (arXiv 2402.02750); jy-yuan/KIVI, `models/llama_kivi.py` and `quant/new_pack.py`. After a step that fills the
residual of R keys all of them are quantized; of values the oldest is, as soon as there are more than R. So a step reads up to
R keys and R + 1 values exactly, its own included. Scales and zeros are float16. The paper has R = 128, its examples R = 32.
"""

from elastickv.evaluation.kv_formats.reference_format import ReferenceFormat, StoredPlane
from elastickv.evaluation.kv_formats.rounding_modes import to_half, uniform_codes
from elastickv.evaluation.prefill import Tensor

GROUP = 32
RESIDUAL, SHORT_RESIDUAL = 128, 32
_SCALE_AND_ZERO_BYTES = 4


def _grouped(x: Tensor, bits: int, dim: int) -> Tensor:
    quantized = uniform_codes(x, bits, dim)
    return quantized.codes * to_half(quantized.scale) + to_half(quantized.zero)


def _format(name: str, bits: int, residual: int) -> ReferenceFormat:
    keys = StoredPlane(
        lambda x: _grouped(x.unflatten(-2, (-1, GROUP)), bits, -2).flatten(-3, -2),
        lambda head_dim: head_dim * (GROUP * bits // 8 + _SCALE_AND_ZERO_BYTES),
        group=GROUP,
        block=residual,
        window=1,
    )
    values = StoredPlane(
        lambda x: _grouped(x.unflatten(-1, (-1, GROUP)), bits, -1).flatten(-2),
        lambda head_dim: head_dim // GROUP * (GROUP * bits // 8 + _SCALE_AND_ZERO_BYTES),
        window=residual + 1,
        channels=GROUP,
    )
    return ReferenceFormat(name, keys, values, f"KIVI (arXiv 2402.02750), jy-yuan/KIVI, R={residual}")


KIVI2 = _format("kivi2", 2, RESIDUAL)
KIVI4 = _format("kivi4", 4, RESIDUAL)
KIVI2_R32 = _format("kivi2_r32", 2, SHORT_RESIDUAL)
KIVI4_R32 = _format("kivi4_r32", 4, SHORT_RESIDUAL)
