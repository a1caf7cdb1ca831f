"""FlashAttention 3's decode attention as vLLM builds it, with keys and values in bf16; needs a Hopper GPU."""

from functools import partial
from typing import Any

from elastickv.benchmark.contenders.base import Contender, PeerWork, Variant
from elastickv.benchmark.contenders.torch_timing import checked, distribution_version, inputs, unusable

_VERSION = 3


class FlashAttention3:
    """One query per sequence over contiguous keys and values; the kernel chooses its splits."""

    name = "flash-attention-3"

    def version(self) -> str | None:
        """Return the version of vLLM, or None."""
        return distribution_version("vllm")

    def variants(self, work: PeerWork) -> dict[str, Variant]:
        """Return the bf16 variant, or why it cannot run."""
        name = f"{self.name}-bf16"
        if work.device.kind != "cuda":
            return {name: "runs on CUDA devices only"}
        return {name: unusable(work) or partial(_ready, name, f"vLLM {self.version()}", work)}


def _ready(name: str, version: str, work: PeerWork) -> Contender:
    import torch
    from vllm.vllm_flash_attn import fa_version_unsupported_reason, flash_attn_varlen_func, is_fa_version_supported

    if not is_fa_version_supported(_VERSION):
        raise RuntimeError(str(fa_version_unsupported_reason(_VERSION)))
    data, batch = inputs(work, "bf16"), work.shape.batch
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    lengths = torch.full_like(starts[1:], work.context)
    rows = [(queries[:, :, 0], keys.transpose(1, 2), values.transpose(1, 2)) for queries, keys, values in data.rows]

    def attend(copy: int) -> Any:
        return flash_attn_varlen_func(
            *rows[copy],
            max_seqlen_q=1,
            cu_seqlens_q=starts,
            max_seqlen_k=work.context,
            seqused_k=lengths,
            causal=True,
            fa_version=_VERSION,
        )

    return checked(name, version, "bf16", work, data, attend)
