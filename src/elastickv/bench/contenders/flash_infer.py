"""FlashInfer's decode attention, with keys and values in bf16 and in fp8. It compiles its kernels when they are first used."""

from collections.abc import Callable
from functools import partial
from typing import Any

from elastickv.bench.contenders.base import Contender, PeerWork, Variant
from elastickv.bench.contenders.torch_timing import TORCH_NAMES, Inputs, checked, distribution_version, inputs, unusable

_HEAD_DIMS = (64, 128, 256)
_PAGE_TOKENS = 16
# What its documentation recommends, twice: the tensor-core plan of a large batch takes more.
_WORKSPACE_BYTES = 256 << 20


class FlashInfer:
    """Contiguous keys and values of a single sequence, and a paged cache; on CUDA cores and on tensor cores (`-tc`).

    Queries are bf16; fp8 keys and values are e4m3 with a scale of 1.
    """

    name = "flashinfer"

    def version(self) -> str | None:
        """Return FlashInfer's version, or None."""
        return distribution_version("flashinfer-python")

    def variants(self, work: PeerWork) -> dict[str, Variant]:
        """Return each way of calling it, for each dtype of keys and values."""
        if work.device.kind != "cuda":
            return {self.name: "runs on CUDA devices only"}
        refusal = unusable(work)
        if refusal is None and work.shape.head_dim not in _HEAD_DIMS:
            refusal = f"no kernel for head_dim {work.shape.head_dim}: its own are {', '.join(map(str, _HEAD_DIMS))}"
        version, variants = str(self.version()), dict[str, Variant]()
        for dtype in ("bf16", "fp8"):
            for cores, tensor_cores in {"": False, "-tc": True}.items():
                single, paged = (f"{self.name}-{call}{cores}-{dtype}" for call in ("single", "paged"))
                several = "decodes one sequence" if work.shape.batch > 1 else None
                variants[single] = refusal or several or partial(_ready, single, version, work, dtype, tensor_cores, _single)
                variants[paged] = refusal or partial(_ready, paged, version, work, dtype, tensor_cores, _paged)
        return variants


_Call = Callable[[PeerWork, str, Inputs, bool], Callable[[int], Any]]


def _ready(name: str, version: str, work: PeerWork, dtype: str, tensor_cores: bool, call: _Call) -> Contender:
    data = inputs(work, dtype, token_major=True)
    return checked(name, version, dtype, work, data, call(work, dtype, data, tensor_cores))


def _single(work: PeerWork, dtype: str, data: Inputs, tensor_cores: bool) -> Callable[[int], Any]:
    from flashinfer import single_decode_with_kv_cache

    rows = [(q[0, :, 0], keys[0, : work.context], values[0, : work.context]) for q, keys, values in data.rows]
    return lambda copy: single_decode_with_kv_cache(*rows[copy], kv_layout="NHD", use_tensor_cores=tensor_cores)


def _paged(work: PeerWork, dtype: str, data: Inputs, tensor_cores: bool) -> Callable[[int], Any]:
    import torch
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    shape = work.shape

    def whole(*values: int) -> Any:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    # Padded planes are cut into pages as they lie: pages in order, as favourable as a page table can be.
    pages = data.rows[0][1].shape[1] // _PAGE_TOKENS
    used = -(-work.context // _PAGE_TOKENS)
    bounds = whole(*(used * row for row in range(shape.batch + 1)))
    indices = torch.cat([torch.arange(used, dtype=torch.int32, device="cuda") + pages * row for row in range(shape.batch)])
    last = whole(*[(work.context - 1) % _PAGE_TOKENS + 1] * shape.batch)
    buffers = {
        "paged_kv_indptr_buffer": bounds.clone(),
        "paged_kv_indices_buffer": indices.clone(),
        "paged_kv_last_page_len_buffer": last.clone(),
    }
    workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_cuda_graph=work.graph, use_tensor_cores=tensor_cores, **(buffers if work.graph else {})
    )
    wrapper.plan(
        bounds,
        indices,
        last,
        shape.query_heads,
        shape.kv_heads,
        shape.head_dim,
        _PAGE_TOKENS,
        q_data_type=torch.bfloat16,
        kv_data_type=getattr(torch, TORCH_NAMES[dtype]),
    )
    size = (-1, _PAGE_TOKENS, shape.kv_heads, shape.head_dim)
    rows = [(q[:, :, 0], (keys.view(size), values.view(size))) for q, keys, values in data.rows]
    return lambda copy: wrapper.run(*rows[copy])
