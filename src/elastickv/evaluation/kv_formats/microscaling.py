"""nvfp4 and mxfp4: float4 e2m1 elements of a token in small blocks that share an 8-bit scale.

mxfp4: OCP Microscaling Formats 1.0 (2023), 6.3: 32 elements share the power of two 2^(floor(log2 max|x|) - 2). nvfp4: NVIDIA,
16 elements share max|x| / 6 as float8 e4m3, and all a float32 scale; ggml-org/llama.cpp, `ggml/src/ggml-quants.c`
(`quantize_row_nvfp4_ref`) has 1 there, as vLLM 0.33 has without scales in the checkpoint; `nvfp4_calibrated` maps the largest
number of a layer's first tokens to 6 * 448.
"""

from dataclasses import replace

import torch

from elastickv.evaluation.kv_formats.reference_format import ReferenceFormat, StoredPlane
from elastickv.evaluation.kv_formats.rounding_modes import E2M1_MAX, E4M3_MAX, to_e2m1, to_e4m3
from elastickv.evaluation.prefill import Tensor

NVFP4_BLOCK, MXFP4_BLOCK = 16, 32
_LARGEST_EXPONENT = 2  # of e2m1: 6 = 1.5 * 2^2


def _nvfp4(x: Tensor) -> Tensor:
    blocks = x.unflatten(-1, (-1, NVFP4_BLOCK))
    scale = to_e4m3(blocks.abs().amax(-1, keepdim=True) / E2M1_MAX)
    return (to_e2m1((blocks / scale).where(scale > 0, 0)) * scale).flatten(-2)


def _mxfp4(x: Tensor) -> Tensor:
    blocks = x.unflatten(-1, (-1, MXFP4_BLOCK))
    _, exponent = torch.frexp(blocks.abs().amax(-1, keepdim=True))  # max|x| is from 2^(exponent - 1) up
    scale = torch.exp2((exponent - 1 - _LARGEST_EXPONENT).clamp(-127, 127).to(x.dtype))
    return (to_e2m1(blocks / scale) * scale).flatten(-2)


_nv = StoredPlane(_nvfp4, lambda head_dim: head_dim // 2 + head_dim // NVFP4_BLOCK, channels=NVFP4_BLOCK)
_mx = StoredPlane(_mxfp4, lambda head_dim: head_dim // 2 + head_dim // MXFP4_BLOCK, channels=MXFP4_BLOCK)
_nv_calibrated = replace(_nv, calibrated_to=E2M1_MAX * E4M3_MAX)
NVFP4 = ReferenceFormat("nvfp4", _nv, _nv, "NVFP4, block scales e4m3, tensor scale 1: llama.cpp, ggml/src/ggml-quants.c")
NVFP4_CALIBRATED = ReferenceFormat(
    "nvfp4_calibrated", _nv_calibrated, _nv_calibrated, "NVFP4, block scales e4m3, a scale a layer"
)
MXFP4 = ReferenceFormat("mxfp4", _mx, _mx, "OCP Microscaling Formats 1.0, 6.3")
