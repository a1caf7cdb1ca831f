"""The blocks of the window: which tokens get one, when it is freed, and what a prefix hit needs of them."""

from collections.abc import Sequence
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from elastickv.vllm.window_spec import WindowSpec


class WindowManager(SlidingWindowManager):
    """Gives null blocks to tokens that leave the window within their own step, and to prefix hits without a window."""

    def __init__(self, kv_cache_spec: WindowSpec, **options: Any) -> None:
        super().__init__(kv_cache_spec, **options)
        self._spec = kv_cache_spec
        self._freed: dict[str, int] = {}  # request -> leading blocks that are null

    def _first_stored_block(self, tokens: int) -> int:
        return self._spec.first_stored(tokens) // self.block_size

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Return the blocks to take from the pool: those of `allocate_new_blocks` that are not null, and computed ones."""
        of_request = len(self.req_to_blocks.get(request_id, ()))
        skipped = self.get_num_skipped_tokens(total_computed_tokens) // self.block_size
        held = max(of_request + len(new_computed_blocks), skipped)
        loaded = 0
        if total_computed_tokens > num_local_computed_tokens:  # a connector loads tokens into the window
            loaded = max(0, cdiv(total_computed_tokens, self.block_size) - held)
        first = max(held + loaded, self._first_stored_block(num_tokens_main_model))
        blocks = loaded + max(0, cdiv(num_tokens, self.block_size) - first)
        if apply_admission_cap and self.max_admission_blocks_per_request is not None:
            blocks = min(blocks, self.max_admission_blocks_per_request)
        return blocks + self._get_num_evictable_blocks(new_computed_blocks[max(0, skipped - of_request) :])

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Extend a request's blocks to `num_tokens` tokens; those that no later step reads are null."""
        blocks = self.req_to_blocks[request_id]
        required = cdiv(num_tokens, self.block_size)
        nulls = max(0, min(required, self._first_stored_block(num_tokens_main_model)) - len(blocks))
        stored = self.block_pool.get_new_blocks(max(0, required - nulls - len(blocks)))
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in stored)
        new = [self._null_block] * nulls + stored
        blocks.extend(new)
        return new

    def cache_blocks(self, request: Any, num_tokens: int, *arguments: Any, **options: Any) -> None:
        """Let later requests hit the blocks of a request's first tokens, but for what it generated with selected pages."""
        if self._spec.prompt_hits:
            num_tokens = min(num_tokens, request.num_prompt_tokens)
        super().cache_blocks(request, num_tokens, *arguments, **options)

    def _remove_blocks_in_range(self, request_id: str, first_block: int, last_block: int) -> None:
        """Free blocks; unlike in vLLM's window, null blocks may be among them."""
        blocks = self.req_to_blocks.get(request_id)
        if blocks is None:
            return
        first, last = max(first_block, self._freed.get(request_id, 0)), min(last_block, len(blocks))
        if first >= last:
            return
        self.block_pool.free_blocks([block for block in reversed(blocks[first:last]) if not block.is_null])
        blocks[first:last] = [self._null_block] * (last - first)
        self._freed[request_id] = last

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Return a request's blocks that are not null, and forget the request."""
        self._freed.pop(request_id, None)
        return [block for block in super().pop_blocks_for_free(request_id) if not block.is_null]

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Return the blocks of a hit, and its tokens.

        A hit that needs no window is as long as `max_length` allows. It has the window's blocks that are there up to its end,
        and null blocks below the last one that is gone.
        """
        if kv_cache_spec.hit_tokens:
            return super().find_longest_cache_hit(
                block_hashes,
                max_length,
                kv_cache_group_ids,
                block_pool,
                kv_cache_spec,
                drop_eagle_block,
                alignment_tokens,
                dcp_world_size,
                pcp_world_size,
            )
        assert dcp_world_size == pcp_world_size == 1, "a sliding window is not sharded"
        size = kv_cache_spec.block_size
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=alignment_tokens,
        )
        aligned = max_length // alignment_tokens - int(drop_eagle_block)
        count = max(0, aligned) * alignment_tokens // size
        hit = tuple([block_pool.null_block] * count for _ in kv_cache_group_ids)
        window = cls._contiguous_blocks_for_hit(kv_cache_spec.sliding_window, size, False)
        for i in range(count - 1, max(-1, count - 1 - window), -1):
            cached = block_pool.get_cached_block(hashes[i], kv_cache_group_ids)
            if not cached:
                break
            for blocks, block in zip(hit, cached, strict=True):
                blocks[i] = block
        return hit, count * size


def register_specs() -> None:
    """Register the specification of the window with vLLM, once its own are there."""
    # Were ours the first, vLLM would take its own for registered.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(WindowSpec, WindowManager, uniform_type_base_spec=SlidingWindowSpec)
