"""PyTorch's scaled_dot_product_attention: flash, cuDNN, memory-efficient on CUDA; flash on the CPU."""

import itertools
import warnings
from functools import partial
from typing import Any

from elastickv.benchmark.contenders.base import Contender, PeerWork, Variant
from elastickv.benchmark.contenders.torch_timing import checked, distribution_version, inputs, unusable

_BACKENDS = {"cuda": ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"), "cpu": ("FLASH_ATTENTION",)}
_DTYPES = {"cuda": ("bf16",), "cpu": ("fp32", "bf16")}


class TorchSdpa:
    """Groups through `enable_gqa`, and folded: the query heads of a group as queries of one head."""

    name = "torch-sdpa"

    def version(self) -> str | None:
        """Return PyTorch's version, or None."""
        return distribution_version("torch")

    def variants(self, work: PeerWork) -> dict[str, Variant]:
        """Return every SDPA backend, form and dtype."""
        refusal, kind = unusable(work), work.device.kind
        forms = {"": False, "-folded": True} if work.shape.group > 1 else {"": False}
        variants: dict[str, Variant] = {}
        for dtype, backend, (form, folded) in itertools.product(_DTYPES[kind], _BACKENDS[kind], forms.items()):
            name = f"{self.name}-{backend.removesuffix('_ATTENTION').lower()}{form}-{dtype}"
            variants[name] = refusal or partial(_ready, name, work, backend, folded, dtype)
        return variants


def _ready(name: str, work: PeerWork, backend: str, folded: bool, dtype: str) -> Contender:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shape, data = work.shape, inputs(work, dtype)
    # The same attention without a mask, and often faster.
    size = (shape.batch, shape.kv_heads, shape.group, shape.head_dim)
    rows = [(queries.view(size) if folded else queries, keys, values) for queries, keys, values in data.rows]
    grouped = shape.group > 1 and not folded

    def attend(copy: int) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(*rows[copy], enable_gqa=grouped)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return checked(
                name, torch.__version__, dtype, work, data, attend, lambda: sdpa_kernel(getattr(SDPBackend, backend))
            )
        except RuntimeError as error:
            raise RuntimeError(_reason(caught, error)) from error


def _reason(caught: list[warnings.WarningMessage], error: RuntimeError) -> str:
    """Return why a variant was refused: PyTorch gives the reason in a warning and raises "No available kernel"."""
    reasons = [str(warning.message).partition(" (Triggered")[0] for warning in caught]
    reasons = [text for text in reasons if not text.endswith("because:") and "runtime disabled" not in text]
    return reasons[0] if reasons and "No available kernel" in str(error) else str(error)
