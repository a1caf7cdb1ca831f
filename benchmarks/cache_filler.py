"""A KV connector for vLLM that fills the cache of long prompts without computing them, whatever its format.

A request with `{"source": true}` among its `kv_transfer_params` is computed as usual, and its blocks are kept as a sample. A
request with `{"fill": true}` counts as computed but for its last token, and copies of the sample's blocks become its blocks. So
every format, layout and window holds what the engine itself stored of tokens; the text of such requests means nothing.

vLLM loads it by name: `kv_connector="CacheFiller"`, `kv_connector_module_path="cache_filler"`.
"""

from dataclasses import dataclass, field

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    SupportsHMA,
)

Blocks = tuple[list[int], ...]  # of each cache group


@dataclass
class CacheFills(KVConnectorMetadata):
    """What a step has to do: the blocks to keep as the sample, and the blocks of each request to fill."""

    sample: Blocks | None = None
    fills: list[Blocks] = field(default_factory=list)


def whole_blocks(blocks: Blocks, sizes: list[int], tokens: int) -> Blocks:
    """Return the blocks whose tokens are all among the first `tokens`; block 0 stands for blocks that are not there."""
    return tuple([block for block in ids[: tokens // size] if block] for ids, size in zip(blocks, sizes, strict=True))


def blocks_of(blocks: Blocks, sizes: list[int], tokens: int) -> Blocks:
    """Return the blocks that hold any of the first `tokens`."""
    return tuple([block for block in ids[: -(-tokens // size)] if block] for ids, size in zip(blocks, sizes, strict=True))


class CacheFiller(KVConnectorBase_V1, SupportsHMA):
    """Both sides of it: the scheduler's, which knows the blocks, and the worker's, which has the tensors."""

    def __init__(self, vllm_config, role, kv_cache_config):
        super().__init__(vllm_config, role, kv_cache_config)
        groups = kv_cache_config.kv_cache_groups
        self._sizes = [group.kv_cache_spec.block_size for group in groups]
        self._layers = [list(group.layer_names) for group in groups]
        self._count = kv_cache_config.num_blocks
        self._next, self._after_next = CacheFills(), CacheFills()
        self._caches: dict[str, torch.Tensor] = {}
        self._sample: dict[str, torch.Tensor] = {}

    # The scheduler's side

    @staticmethod
    def _wants(request, what):
        return bool((request.kv_transfer_params or {}).get(what)) and request.num_output_tokens == 0

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        fill = self._wants(request, "fill")
        return (max(0, request.num_tokens - 1 - num_computed_tokens) if fill else 0), False

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        ids = blocks.get_block_ids()
        if num_external_tokens:
            self._next.fills.append(blocks_of(ids, self._sizes, request.num_tokens - 1))
        elif self._wants(request, "source"):
            # A step later, when the blocks have been written.
            self._after_next.sample = whole_blocks(ids, self._sizes, request.num_tokens)

    def build_connector_meta(self, scheduler_output):
        now, self._next, self._after_next = self._next, self._after_next, CacheFills()
        return now

    def request_finished(self, request, block_ids):
        return False, None

    def request_finished_all_groups(self, request, block_ids):
        return False, None

    # The worker's side

    def register_kv_caches(self, kv_caches):
        self._caches = dict(kv_caches)

    def start_load_kv(self, forward_context, **kwargs):
        work = self._connector_metadata
        assert isinstance(work, CacheFills)
        if work.sample is not None:
            self._each_layer(work.sample, self._keep)
        for blocks in work.fills:
            self._each_layer(blocks, self._fill)

    def wait_for_layer_load(self, layer_name):
        pass

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs):
        pass

    def wait_for_save(self):
        pass

    def _each_layer(self, blocks, act):
        for ids, layers in zip(blocks, self._layers, strict=True):
            index = None
            for layer in layers:
                cache = self._caches[layer]
                if index is None:
                    index = torch.tensor(ids, dtype=torch.long, device=cache.device)
                act(layer, self._by_block(cache), index)

    def _by_block(self, cache):
        """Return a cache whose first dimension is the engine's blocks: a backend's own blocks may be smaller."""
        if cache.shape[0] % self._count:
            raise ValueError(f"a cache of shape {tuple(cache.shape)} has no dimension of {self._count} blocks in front")
        return cache.unflatten(0, (self._count, -1))

    def _keep(self, layer, cache, index):
        if not len(index):
            raise ValueError(f"{layer}: the prompt that is the sample fills no whole block; give a longer one")
        self._sample[layer] = cache[index]

    def _fill(self, layer, cache, index):
        sample = self._sample[layer]
        cache[index] = sample[torch.arange(len(index), device=index.device) % len(sample)]
