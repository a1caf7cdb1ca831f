"""PyTorch's FlexAttention, compiled."""

from functools import partial
from typing import Any

from elastickv.benchmark.contenders.base import Contender, PeerWork, Variant
from elastickv.benchmark.contenders.torch_timing import checked, distribution_version, inputs, unusable

COMPILE_S = 30.0  # about, on two cores
_DTYPES = {"cuda": ("bf16",), "cpu": ("fp32", "bf16")}


class FlexAttention:
    """One query per head through `torch.compile`; needs Triton on CUDA, a C++ compiler on the CPU."""

    name = "flex-attention"

    def version(self) -> str | None:
        """Return PyTorch's version, or None."""
        return distribution_version("torch")

    def variants(self, work: PeerWork) -> dict[str, Variant]:
        """Return one variant per dtype."""
        refusal = unusable(work)
        names = {f"{self.name}-{dtype}": dtype for dtype in _DTYPES[work.device.kind]}
        return {name: refusal or partial(_ready, name, work, dtype) for name, dtype in names.items()}


def _ready(name: str, work: PeerWork, dtype: str) -> Contender:
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    work.require_time(COMPILE_S)
    compiled = torch.compile(flex_attention, dynamic=False)
    data = inputs(work, dtype)

    def attend(copy: int) -> Any:
        return compiled(*data.rows[copy], enable_gqa=work.shape.group > 1)

    return checked(name, torch.__version__, dtype, work, data, attend)
