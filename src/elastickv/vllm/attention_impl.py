"""One layer's attention in vLLM: which caches it has, and what it does in a step."""

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from elastickv.recipe import AttentionShape, Recipe
from elastickv.vllm.block_attention import BlockAttention, LayerStep
from elastickv.vllm.serving_options import ServingOptions, recipe_of
from elastickv.vllm.step_metadata import PageMetadata
from elastickv.vllm.window_cache import SUFFIX, WindowCache, WindowShape

_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_published: dict[int, int] = {}
_shared: dict[tuple[Any, ...], BlockAttention] = {}


def published_slab_bytes(head_size: int) -> int:
    """Return the bytes of one KV head's page, the same for all layers of the model that was loaded last."""
    return _published[head_size]


class ElasticAttentionImpl(AttentionImpl[PageMetadata]):
    """Attention of one layer: the newest tokens are exact, older ones are read from quantized pages.

    Attributes
    ----------
    window : the layer's cache of exact tokens; None until the weights are loaded.
    recipe : formats of the layer's pages.
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
        config = get_current_vllm_config()
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.window: WindowCache | None = None
        self._config = config
        self._layers = config.compilation_config.static_forward_context
        self._options = ServingOptions.parse(config.additional_config) or ServingOptions()
        self.recipe: Recipe = recipe_of(self._options, kv_cache_dtype)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Give the layer its window: all layers are known by now, and vLLM has not asked for their caches yet."""
        if self.window is not None:  # weights were loaded anew
            return
        name = next(name for name, layer in self._layers.items() if getattr(layer, "impl", None) is self)
        self._attention = self._shared_attention(act_dtype)
        _published[self.head_size] = self._attention.slab_bytes
        shape = WindowShape.beside(
            self._attention.slab_bytes,
            tokens=self.recipe.window,
            kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=act_dtype,
            soft=self._options.prefix_reuse == "soft",
        )
        self.window = self._layers[name + SUFFIX] = WindowCache(shape)
        self.bad = torch.full((1,), -1, dtype=torch.int64, device=current_platform.device_type)
        self._window_name = name + SUFFIX

    def _shared_attention(self, act_dtype: torch.dtype) -> BlockAttention:
        """Return the kernels, which layers of one shape and recipe share."""
        shape = AttentionShape(1, self.num_heads, self.num_kv_heads, self.head_size)
        dtype = _DTYPES[act_dtype]
        key = (shape, dtype, self.recipe, self.scale, id(self._config))
        if key not in _shared:
            if current_platform.is_cpu():
                from elastickv.vllm.cpu_attention import CpuAttention

                _shared[key] = CpuAttention(shape, dtype, self.recipe, self.scale)
            else:
                from elastickv.vllm.cuda_attention import CudaAttention

                _shared[key] = CudaAttention(shape, dtype, self.recipe, self.scale, self._config)
        return _shared[key]

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
        assert output_scale is None and output_block_scale is None, "no fused quantization of the output is offered"
        if attn_metadata is None:  # vLLM measures memory
            self._attention.reserve()
            return output.fill_(0)
        assert self.window is not None
        metadata: Any = get_forward_context().attn_metadata
        batch, decoded, tokens = attn_metadata, attn_metadata.decode_tokens, attn_metadata.tokens
        step = LayerStep(key, value, kv_cache, self.window.kv_cache, batch, metadata[self._window_name], self.bad)
        self._attention.store(step)
        if decoded:
            self._attention.decode(step, query[:decoded], output[:decoded])
        if decoded < tokens:
            self._attention.prefill(step, query[decoded:tokens], output[decoded:tokens])
        return output
