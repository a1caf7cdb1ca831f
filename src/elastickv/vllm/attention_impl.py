"""One layer's attention in vLLM: which caches it has, and what it does in a step."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from vllm import envs
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from elastickv.recipe import AttentionShape
from elastickv.vllm.bad_tokens import BadTokens
from elastickv.vllm.block_attention import BlockAttention, HeadRotation, LayerStep
from elastickv.vllm.model_setup import ModelSetup
from elastickv.vllm.startup_checks import Device, LayerArguments, check
from elastickv.vllm.step_metadata import PageMetadata
from elastickv.vllm.versions import installed_version
from elastickv.vllm.window_cache import WindowCache

if TYPE_CHECKING:  # it loads the kernels of CPUs
    from elastickv.vllm.selection.decode_selection import DecodeSelection
    from elastickv.vllm.selection.device_selection import DeviceLayerSelection
    from elastickv.vllm.selection.row_writer import RowWriter


class ElasticAttentionImpl(AttentionImpl[PageMetadata]):
    """Attention of one layer: the newest tokens are exact, older ones are read from quantized pages.

    To vLLM the window is a layer of its own, which `process_weights_after_loading` adds.

    Raises
    ------
    UsageError : if the layer, or vLLM's configuration, is one that cannot be served.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        config = get_current_vllm_config()
        self._arguments = LayerArguments(
            name=f"number {len(config.compilation_config.static_forward_context)}",
            query_heads=num_heads,
            kv_heads=self.num_kv_heads,
            head_dim=head_size,
            attention_type=attn_type,
            kv_cache_dtype=kv_cache_dtype,
            sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap,
            alibi=alibi_slopes is not None,
            sinks=others.get("sinks") is not None,
            shares_cache_of=kv_sharing_target_layer_name,
        )
        check(config, serving_device(), self._arguments)
        self._setup = ModelSetup.joined(self, config, kv_cache_dtype)
        self._shape = AttentionShape(1, num_heads, self.num_kv_heads, head_size)
        self._attention: BlockAttention | None = None
        self._rotation: HeadRotation | None = None
        self._selection: DecodeSelection | DeviceLayerSelection | None = None
        self._window: WindowCache | None = None

    @property
    def bad_tokens(self) -> BadTokens:
        """What kernels report of all layers."""
        return self._setup.bad_tokens

    @property
    def selects_pages(self) -> bool:
        """Whether layers of the model read selected pages."""
        return self._setup.selects_pages

    def rows_for(self, requests: int, device: torch.device) -> "RowWriter | None":
        """Return the memory of what kernels that select pages read of up to `requests` requests; None on a CPU."""
        return self._setup.rows_for(requests, device)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Give the layer its window: all layers are known by now, and vLLM has not asked for their caches yet.

        Raises
        ------
        UsageError : if no kernel supports the layer, or the options do not fit the model.
        """
        if self._window is not None:  # the weights were loaded anew
            return
        setup, name = self._setup, self._setup.name_of(self)
        value_head_dim = getattr(setup.layer(name), "head_size_v", self.head_size)
        check(setup.config, serving_device(), replace(self._arguments, name=name, value_head_dim=value_head_dim))
        if setup.of_drafter(name):
            setup.bad_tokens.add_drafter(name)
        recipe = setup.recipe_of_layer(name, self._shape, act_dtype)
        # The kernels get what is rotated already; `selection_of_layer` has the fractions and anchors.
        fractions = (1.0,) if recipe.selection == "pages" else ()
        stored = replace(recipe, rotate="", fractions=fractions, anchor_every=1)
        self._attention = setup.attention(self._shape, act_dtype, stored, self.scale)
        self._selection = setup.selection_of_layer(name, recipe, self.num_kv_heads)
        smoothing = setup.smoothing_of_layer(name, recipe)
        if recipe.rotate:
            ours = setup.of_this_rank(smoothing, self.num_kv_heads)
            self._rotation = HeadRotation(recipe, self.head_size, act_dtype, current_platform.device_type, ours)
        self._window = setup.add_window(name, self._shape, act_dtype, recipe, self._attention, smoothing)
        self._name, self._window_name, self._last = name, self._window.name, setup.is_last(name)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: PageMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store a step's tokens and attend with them; (tokens, heads, head_size) each."""
        assert self._attention is not None, "the weights were loaded without process_weights_after_loading"
        assert self._window is not None
        assert output_scale is None, "no fused quantization of the output is offered"
        number, words = self.bad_tokens.of_layer(self._name)
        if self._rotation is not None:
            query, key, value = self._rotation.rotate(query, key, value)
        if attn_metadata is None:  # vLLM measures memory
            self._attention.reserve(len(key))
            if self._selection is not None:
                self._selection.reserve()
            return output.fill_(0)
        metadata: Any = get_forward_context().attn_metadata
        recent = metadata[self._window_name]
        batch, decoded, tokens = attn_metadata, attn_metadata.decode_tokens, attn_metadata.tokens
        step = LayerStep(key, value, kv_cache, self._window.kv_cache, batch, recent, words, number, self._selection)
        self._attention.store(step)
        if decoded:
            self._attention.decode(step, query[:decoded], output[:decoded])
        if decoded < tokens:
            self._attention.prefill(step, query[decoded:tokens], output[decoded:tokens])
        if self._rotation is not None:
            self._rotation.rotate_back(output)
        if self._last:
            self._attention.fail(step, self.bad_tokens, output)
        return output


def serving_device() -> Device:
    """Return the device that serves, for the checks."""
    installed = installed_version()
    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    return Device(
        kind=current_platform.device_type,
        capability=(capability.major, capability.minor) if capability is not None else None,
        version=installed.version if installed is not None else "",
        batch_invariant=envs.VLLM_BATCH_INVARIANT,
    )
