"""Attention over blocks on CUDA: our kernels decode and store; FlashAttention serves prompt chunks."""

from functools import cached_property
from typing import Any

import torch

from elastickv.backends.cuda.block_arguments import BlocksArguments, GatherRows, StepRows
from elastickv.backends.cuda.block_kernels import BlockKernels
from elastickv.backends.cuda.device import CudaDevice
from elastickv.kvcache.tensor_view import TensorView
from elastickv.recipe import PAGE_TOKENS, AttentionShape, Recipe
from elastickv.transformers.torch_dtypes import TORCH_DTYPES
from elastickv.vllm.bad_tokens import BadTokens
from elastickv.vllm.block_attention import LayerStep
from elastickv.vllm.chunk_plan import ChunkPlan, KeyRange, scratch_tokens
from elastickv.vllm.drafts import extra_draft_tokens
from elastickv.vllm.selection.device_selection import DeviceLayerSelection

TILE_TOKENS = 32768  # whose keys and values are dequantized at a time: 128 MiB for 8 KV heads of 128 channels


class CudaAttention:
    """Attention over blocks on the current CUDA device.

    Parameters
    ----------
    shape : of the layers' attention; its batch is not used.
    dtype : 'bf16' or 'fp16', of the model and of the window.
    recipe : formats of the pages, and whether decodes read listed ones; its window is the number of exact tokens.
    scale : of scores.
    vllm_config : says how many requests and tokens a step has.

    Raises
    ------
    UsageError : if no kernel supports the combination.
    """

    def __init__(self, shape: AttentionShape, dtype: str, recipe: Recipe, scale: float, vllm_config: Any) -> None:
        scheduler, compilation = vllm_config.scheduler_config, vllm_config.compilation_config
        requests, extra = scheduler.max_num_seqs, extra_draft_tokens(vllm_config)
        rows = max(requests * (1 + vllm_config.num_speculative_tokens + extra), *(compilation.cudagraph_capture_sizes or [0]))
        self._device = CudaDevice(torch.accelerator.current_device_index())
        widest = AttentionShape(rows, shape.query_heads, shape.kv_heads, shape.head_dim)
        pages = -(-vllm_config.model_config.max_model_len // PAGE_TOKENS)
        self._kernels = BlockKernels(self._device, widest, dtype, recipe, recipe.window, pages)
        self._shape, self._dtype, self._recipe, self._scale = shape, dtype, recipe, scale
        self._scratch_tokens = scratch_tokens(TILE_TOKENS, scheduler.max_num_batched_tokens + requests * extra, requests)
        self.slab_bytes = self._kernels.slab.n_bytes

    def reserve(self, tokens: int) -> None:
        """Allocate the scratch memory, and for a moment the most that `_exact` takes, so that vLLM counts both."""
        assert self._scratch.shape[1] >= tokens
        self._rows_of(self._scratch_tokens + self._recipe.window)

    @cached_property
    def _scratch(self) -> torch.Tensor:
        """Memory of dequantized keys and values."""
        return self._rows_of(self._scratch_tokens)

    def _rows_of(self, tokens: int) -> torch.Tensor:
        """Return memory for keys and values: (2, tokens, kv_heads, head_dim)."""
        shape, dtype = self._shape, TORCH_DTYPES[self._dtype]
        return torch.empty(2, tokens, shape.kv_heads, shape.head_dim, dtype=dtype, device="cuda")

    def find_first(
        self, block_table: torch.Tensor, lengths: torch.Tensor, starts: torch.Tensor, block_tokens: int, first: torch.Tensor
    ) -> None:
        """Write `WindowMetadata.first`."""
        table = BlocksArguments(
            pages=None,
            window=None,
            page_table=None,
            window_table=block_table.data_ptr(),
            page_stride=0,
            window_stride=0,
            kv_heads=self._shape.kv_heads,
            slab_bytes=0,
            page_columns=0,
            window_columns=block_table.stride(0),
            window_shift=block_tokens.bit_length() - 1,
        )
        self._follow()
        self._kernels.find_first(table, lengths.data_ptr(), starts.data_ptr(), first.data_ptr(), len(first))

    def store(self, step: LayerStep) -> None:
        """Store a step's tokens in the window and quantize the pages that they complete."""
        batch = step.batch
        self._follow()
        self._kernels.store(
            self._blocks(step),
            self._rows(step),
            batch.lengths.data_ptr(),
            batch.starts.data_ptr(),
            step.recent.slot_mapping.data_ptr(),
            step.bad.data_ptr(),
            batch.requests,
            batch.longest,
            step.layer,
        )

    def fail(self, step: LayerStep, bad: BadTokens, output: torch.Tensor) -> None:
        """Make outputs NaN from the tokens on that could not be stored, and move their words to the host's memory."""
        assert output.is_contiguous()
        self._follow()
        self._kernels.fail(
            bad.words.data_ptr(),
            bad.reported.data_ptr(),
            bad.step.data_ptr(),
            bad.words.shape[1],
            step.batch.lengths.data_ptr(),
            step.batch.starts.data_ptr(),
            output.data_ptr(),
        )

    def decode(self, step: LayerStep, query: torch.Tensor, output: torch.Tensor) -> None:
        """Attend with the tokens of decodes: (tokens, query_heads, head_size) each."""
        batch, lists = step.batch, None
        if step.selection is not None:
            assert isinstance(step.selection, DeviceLayerSelection)
            assert batch.rows is not None
            lists = step.selection.arguments(batch.rows)
        ragged: dict[str, Any] = {}
        if not batch.uniform_queries:
            if "row_requests" not in batch.shared:
                batch.shared["row_requests"] = self._row_requests(batch.starts_list[: batch.decodes + 1], query.device)
            ragged = {"starts": batch.starts.data_ptr(), "row_requests": batch.shared["row_requests"].data_ptr()}
        self._follow()
        self._kernels.decode(
            self._blocks(step),
            self._rows(step),
            self._view(query),
            output.data_ptr(),
            batch.lengths.data_ptr(),
            step.recent.first.data_ptr(),
            queries_per_request=batch.uniform_queries,
            scale=self._scale,
            after_store=batch.reads_new_pages(self._recipe.window),
            lists=lists,
            **ragged,
        )

    def prefill(self, step: LayerStep, query: torch.Tensor, output: torch.Tensor) -> None:
        """Attend with the tokens of prompt chunks: to exact tokens and to dequantized pages, merged by log-sum-exp."""
        batch = step.batch
        if "chunks" not in batch.shared:
            window, most = self._recipe.window, self._scratch_tokens
            batch.shared["chunks"] = ChunkPlan.all_of(batch, window, TILE_TOKENS, most, query.device)
        for plan in batch.shared["chunks"]:
            rows = slice(plan.tokens.start - batch.decode_tokens, plan.tokens.stop - batch.decode_tokens)
            self._prefill(step, plan, query[rows], output[rows])

    def _prefill(self, step: LayerStep, plan: ChunkPlan, query: torch.Tensor, output: torch.Tensor) -> None:
        keys, values = self._exact(step, plan)
        exact_tokens = self._recipe.window
        total = self._flash(query, keys, values, plan, plan.exact, window=(exact_tokens - 1, 0), causal=True, output=output)
        for part in plan.packed:
            keys, values = self._gather(step, plan, part)
            partial = self._flash(query, keys, values, plan, part, causal=part.causal)
            total = self._merge(output, total, partial)

    def _exact(self, step: LayerStep, plan: ChunkPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of the chunks, each behind the window before it."""
        keys, values = step.keys[plan.tokens], step.values[plan.tokens]
        if plan.chunk_rows is None:
            return _finite(keys), _finite(values)
        shape = (plan.exact.rows, *keys.shape[1:])
        together = keys.new_empty(shape), values.new_empty(shape)
        self._read(step, plan, plan.tails, *together)
        together[0].index_copy_(0, plan.chunk_rows, keys)
        together[1].index_copy_(0, plan.chunk_rows, values)
        return _finite(together[0], out=together[0]), _finite(together[1], out=together[1])

    def _gather(self, step: LayerStep, plan: ChunkPlan, part: KeyRange) -> tuple[torch.Tensor, torch.Tensor]:
        assert part.rows <= self._scratch_tokens, "chunks of more tokens than a step may have"
        keys, values = self._scratch[0, : part.rows], self._scratch[1, : part.rows]
        self._read(step, plan, part, keys, values)
        return _finite(keys, out=keys), _finite(values, out=values)

    def _read(self, step: LayerStep, plan: ChunkPlan, part: KeyRange, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._follow()
        first = step.recent.first[plan.first_request :] if part is plan.tails else plan.never
        rows = GatherRows(
            first=part.first.data_ptr(),
            count=part.count.data_ptr(),
            start=part.start.data_ptr(),
            exact_first=first.data_ptr(),
            first_request=plan.first_request,
        )
        self._kernels.gather(self._blocks(step), rows, keys.data_ptr(), values.data_ptr(), plan.requests, part.longest)

    def _flash(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        plan: ChunkPlan,
        part: KeyRange,
        *,
        causal: bool,
        window: tuple[int, int] | None = None,
        output: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return output and log-sum-exp, (query_heads, tokens), of attention to keys that follow each other by request."""
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

        result: tuple[torch.Tensor, torch.Tensor] = flash_attn_varlen_func(
            q=query,
            k=keys,
            v=values,
            out=output,
            cu_seqlens_q=plan.query_start,
            max_seqlen_q=plan.longest,
            cu_seqlens_k=part.start,
            max_seqlen_k=part.longest,
            softmax_scale=self._scale,
            causal=causal,
            window_size=list(window) if window else None,
            return_softmax_lse=True,
            fa_version=get_flash_attn_version(head_size=query.shape[-1]),
        )
        return result[0], result[1]

    def _merge(
        self, output: torch.Tensor, one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

        lse = torch.empty_like(one[1])
        merged = torch.empty_like(output)
        merge_attn_states(merged, other[0], other[1], one[0], one[1], output_lse=lse)
        output.copy_(merged)
        return output, lse

    def _follow(self) -> None:
        """Queue on PyTorch's stream, which is another one while a graph is captured."""
        self._device.follow(torch.cuda.current_stream().cuda_stream)

    def _view(self, tensor: torch.Tensor) -> TensorView:
        return TensorView(tensor.data_ptr(), self._dtype, tuple(tensor.shape), tensor.stride())

    def _rows(self, step: LayerStep) -> StepRows:
        return StepRows.of(self._view(step.keys), self._view(step.values))

    @staticmethod
    def _row_requests(starts: list[int], device: torch.device) -> torch.Tensor:
        counts = torch.tensor([after - before for before, after in zip(starts, starts[1:], strict=False)])
        return torch.arange(len(counts), dtype=torch.int32).repeat_interleave(counts).to(device, non_blocking=True)

    def _blocks(self, step: LayerStep) -> BlocksArguments:
        pages, window = step.batch.block_table, step.recent.block_table
        return BlocksArguments(
            pages=step.pages.data_ptr(),
            window=step.window.data_ptr(),
            page_table=pages.data_ptr(),
            window_table=window.data_ptr(),
            page_stride=step.pages.stride(0),
            window_stride=step.window.stride(0),
            kv_heads=self._shape.kv_heads,
            slab_bytes=step.slab_bytes,
            page_columns=pages.stride(0),
            window_columns=window.stride(0),
            window_shift=step.window_shift,
        )


def _finite(rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return keys or values with zeros for NaN and infinities, so that they stay within their request.

    FlashAttention 3 loads whole tiles, which reach into the next request's rows: a weight of 0 times NaN would be NaN.
    """
    return torch.nan_to_num(rows, nan=0.0, posinf=0.0, neginf=0.0, out=out)
