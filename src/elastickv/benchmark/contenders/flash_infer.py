"""FlashInfer's decode attention, with keys and values in bf16 and in fp8. Kernels compile on first use."""

from collections.abc import Callable
from functools import partial
from typing import Any

from elastickv.benchmark.contenders.base import Contender, PeerWork, Variant
from elastickv.benchmark.contenders.torch_timing import TORCH_NAMES, Inputs, checked, distribution_version, inputs, unusable

_HEAD_DIMS = (64, 128, 256)
# The fastest layout and page size on an H100, by up to 8 % (benchmarks/NOTES.md).
_LAYOUT = "HND"
_PAGE_TOKENS = 32
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
        """Return each way of calling FlashInfer, for each dtype of keys and values."""
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


# Makes the function that attends to one copy.
_Call = Callable[[PeerWork, str, Inputs, bool], Callable[[int], Any]]


def _ready(name: str, version: str, work: PeerWork, dtype: str, tensor_cores: bool, call: _Call) -> Contender:
    data = inputs(work, dtype, _PAGE_TOKENS if call is _paged else None)
    return checked(name, version, dtype, work, data, call(work, dtype, data, tensor_cores))


def _single(work: PeerWork, dtype: str, data: Inputs, tensor_cores: bool) -> Callable[[int], Any]:
    from flashinfer import single_decode_with_kv_cache

    rows = [(queries[0, :, 0], keys[0], values[0]) for queries, keys, values in data.rows]
    return lambda copy: single_decode_with_kv_cache(*rows[copy], kv_layout=_LAYOUT, use_tensor_cores=tensor_cores)


def _paged(work: PeerWork, dtype: str, data: Inputs, tensor_cores: bool) -> Callable[[int], Any]:
    import torch
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    shape = work.shape
    pages = -(-work.context // _PAGE_TOKENS)

    def count(stop: int) -> Any:
        return torch.arange(stop, dtype=torch.int32, device="cuda")

    # Pages in order: the most favorable page table.
    bounds, indices = count(shape.batch + 1) * pages, count(shape.batch * pages)
    last = torch.full_like(bounds[1:], (work.context - 1) % _PAGE_TOKENS + 1)
    buffers = {
        "paged_kv_indptr_buffer": bounds.clone(),
        "paged_kv_indices_buffer": indices.clone(),
        "paged_kv_last_page_len_buffer": last.clone(),
    }
    workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        workspace, _LAYOUT, use_cuda_graph=work.graph, use_tensor_cores=tensor_cores, **(buffers if work.graph else {})
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
    rows = [(queries[:, :, 0], (keys, values)) for queries, keys, values in data.rows]
    return lambda copy: wrapper.run(*rows[copy])
