"""What a step's attention needs of the batch, built once a step for all layers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadata, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from elastickv.recipe.formats import PAGE_TOKENS
from elastickv.vllm.bad_tokens import BadTokens
from elastickv.vllm.drafts import extra_draft_tokens
from elastickv.vllm.selection.request_ratios import newest_blocks, ratios_of_step

if TYPE_CHECKING:  # it loads the CUDA backend
    from elastickv.vllm.selection.device_selection import SelectionRows

_log = init_logger("vllm.elastickv")


def most_requests(config: Any) -> int:
    """Return the most requests that a step has; a captured graph's are padded to as many as its tokens."""
    graphs: list[int] = config.compilation_config.cudagraph_capture_sizes or []
    return max([config.scheduler_config.max_num_seqs, *graphs])


@dataclass
class PageMetadata(AttentionMetadata):
    """A step's requests: decodes first, then prompt chunks.

    Attributes
    ----------
    block_table : (requests, columns) int32 numbers of the pages' blocks.
    lengths : (requests,) int32, tokens of each request with those of the step.
    starts : (requests + 1,) int32, where each request's tokens begin in the step.
    starts_list : `starts` on the host.
    lengths_list : `lengths` on the host where the step has prompt chunks, for which they are exact.
    decodes, decode_tokens : requests with few enough tokens for the decode kernels, and their tokens.
    uniform_queries : tokens of each decode; 0 if they differ.
    longest : most tokens of a request.
    computes_prompt : whether the step computes tokens of a prompt. A request that comes with it may have hit the prompt's
        blocks, and reads what this step stores there.
    prompts : (requests,) tokens of each request's prompt, which read every page; None: every token does.
    ratios : request -> its own ratio of dense bytes / bytes read, of those that have one; on a CPU.
    rows : what kernels that select pages read of the requests; on a GPU.
    shared : what attention computes from the batch in the first layer and reads in the others.
    """

    block_table: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    starts_list: list[int]
    lengths_list: list[int]
    requests: int
    tokens: int
    decodes: int
    decode_tokens: int
    uniform_queries: int
    longest: int
    computes_prompt: bool = False
    prompts: torch.Tensor | None = None
    ratios: Mapping[int, float] = field(default_factory=dict)
    rows: "SelectionRows | None" = None
    shared: dict[str, Any] = field(default_factory=dict)

    def reads_new_pages(self, exact_tokens: int) -> bool:
        """Whether decodes may read pages that are completed in this step, so that they must wait until those are stored.

        The last of a request's query tokens reads pages that begin before its newest `exact_tokens` tokens. Where these are
        few, drafts complete such a page.
        """
        return self.computes_prompt or self.longest > exact_tokens - PAGE_TOKENS + 1


class PageMetadataBuilder(AttentionMetadataBuilder[PageMetadata]):
    """Builds `PageMetadata`; a captured graph serves batches whose requests have equally many tokens."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        layers = vllm_config.compilation_config.static_forward_context
        impl = layers[layer_names[0]].impl
        self._bad_tokens: BadTokens = impl.bad_tokens
        of_drafter = all(getattr(layers[name], "is_draft_layer", False) for name in layer_names)
        self._selects = impl.selects_pages and not of_drafter
        self._rows = impl.rows_for(most_requests(vllm_config) + 1, device) if self._selects else None
        # vLLM captures graphs twice: at first to measure them, without knowing how many blocks it will have, then to serve.
        self._serves = vllm_config.cache_config.num_gpu_blocks is not None
        # vLLM builds a draft model's step of requests one token longer than the model's, and says the model's lengths for it.
        self._extra_tokens = extra_draft_tokens(vllm_config) if of_drafter else 0

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> PageMetadata:
        """Return the metadata of a step."""
        self._bad_tokens.mark_step()
        if self._selects and self._serves:
            # A window of generated tokens that covers all of them: from the next step on vLLM says where prompts end. Not
            # earlier, so that layers of other backends do not look at it: their builders that serve are there by now.
            model = self.vllm_config.model_config
            model.model_arch_config.rswa_window = model.max_model_len
        batch, threshold = common_attn_metadata, (self.reorder_batch_threshold or 1) + self._extra_tokens
        decodes, _, decode_tokens, _ = split_decodes_and_prefills(batch, decode_threshold=threshold)
        starts = batch.query_start_loc_cpu[: batch.num_reqs + 1].tolist()
        lengths: list[int] = []
        if decodes < batch.num_reqs:  # the host needs them for prompt chunks only
            on_host = batch.seq_lens_cpu_upper_bound
            lengths = batch.seq_lens.tolist() if on_host is None else (on_host + self._extra_tokens).tolist()
        counts = {after - before for before, after in zip(starts[:decodes], starts[1 : decodes + 1], strict=True)}
        # A graph's batch is padded with requests of no token, whose rows follow the others.
        each = decode_tokens // max(decodes, 1)
        uniform = each if each * decodes == decode_tokens and counts <= {0, each} else 0
        return PageMetadata(
            block_table=batch.block_table_tensor,
            lengths=batch.seq_lens,
            starts=batch.query_start_loc,
            starts_list=starts,
            lengths_list=lengths,
            requests=batch.num_reqs,
            tokens=batch.num_actual_tokens,
            decodes=decodes,
            decode_tokens=decode_tokens,
            uniform_queries=uniform,
            longest=batch.max_query_len,
            computes_prompt=decodes < batch.num_reqs or (batch.is_prefilling is not None and bool(batch.is_prefilling.any())),
            prompts=batch.rswa_prefix_lens,
            ratios=_ratios(batch) if ratios_of_step() and self._rows is None else {},
            rows=self._rows.write(batch, ratios_of_step()) if self._rows is not None else None,
        )


def _ratios(batch: CommonAttentionMetadata) -> dict[int, float]:
    """Return the ratios of a step's requests, which are known by the block of the newest token."""
    blocks = newest_blocks(batch).tolist()
    return {request: ratio for request, block in enumerate(blocks) if (ratio := ratios_of_step().get(block)) is not None}


@dataclass
class WindowMetadata(AttentionMetadata):
    """A step's window.

    Attributes
    ----------
    block_table : (requests, columns) int32 numbers of the window's blocks.
    slot_mapping : (tokens,) int64, where the window stores each token; slots of block 0 store nothing.
    first : (requests,) int32. Tokens below it are read from pages even if they are among the exact ones: after a prefix hit, a
        block of the window may be gone. It is the end of the last such block that a query of the step would read, rounded up to
        a page, but no further than complete pages go; 0 if none is gone.
    """

    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    first: torch.Tensor


class WindowMetadataBuilder(AttentionMetadataBuilder[WindowMetadata]):
    """Builds `WindowMetadata`."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        requests, of_decode = vllm_config.scheduler_config.max_num_seqs, self.reorder_batch_threshold or 1
        largest = max(vllm_config.compilation_config.cudagraph_capture_sizes or [0])
        if 0 < largest < requests * of_decode:
            _log.info_once(
                "ElasticKV: CUDA graphs serve up to %d requests that decode; steps of more, up to %d, run without them: for "
                "graphs there too, give a larger `max_cudagraph_capture_size` in `compilation_config`",
                largest // of_decode,
                requests,
            )
        # A captured graph reads it at this address.
        self._first = torch.zeros(most_requests(vllm_config) + 1, dtype=torch.int32, device=device)
        self._block_tokens = kv_cache_spec.block_size
        assert self._block_tokens.bit_count() == 1, "kernels find a token's block by shifts"
        self._attention = vllm_config.compilation_config.static_forward_context[layer_names[0]].attention

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> WindowMetadata:
        """Return the metadata of a step."""
        batch, attention = common_attn_metadata, self._attention
        first = self._first[: batch.num_reqs]
        attention.find_first(batch.block_table_tensor, batch.seq_lens, batch.query_start_loc, self._block_tokens, first)
        return WindowMetadata(batch.block_table_tensor, batch.slot_mapping, first)
