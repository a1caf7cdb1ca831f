"""What the layers of a model share: page formats, kernels, the size of a slab, and the lines logged at the start."""

import logging
from typing import Any, ClassVar

import torch
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from elastickv.errors import UsageError
from elastickv.recipe import AttentionShape, Recipe
from elastickv.recipe.formats import PAGE_TOKENS
from elastickv.vllm.bad_tokens import BadTokens
from elastickv.vllm.block_attention import BlockAttention
from elastickv.vllm.capacity import Capacity
from elastickv.vllm.checkpoint_fingerprint import checkpoint_fingerprint, checkpoint_folder
from elastickv.vllm.layer_formats import ServedModel, SlabPlan, layer_recipes, with_calibration_hash
from elastickv.vllm.serving_options import ServingOptions, recipe_of
from elastickv.vllm.stock_windows import share_blocks
from elastickv.vllm.window_cache import SUFFIX, WindowCache, WindowShape

_log = logging.getLogger("vllm.elastickv")
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class ModelSetup:
    """The layers of one engine's model on this rank.

    Attributes
    ----------
    options : the user's.
    kv_cache_dtype, recipe : of layers for which nothing says another.
    config : vLLM's.
    bad_tokens : words in which kernels report what cannot be stored.
    """

    newest: ClassVar["ModelSetup | None"] = None

    def __init__(self, config: Any, kv_cache_dtype: str) -> None:
        # vLLM's hash, which names its compiled graphs, must change with the calibration's content.
        config.additional_config = with_calibration_hash(config.additional_config)
        self.options = ServingOptions.parse(config.additional_config) or ServingOptions()
        self.kv_cache_dtype, self.recipe = kv_cache_dtype, recipe_of(self.options, kv_cache_dtype)
        self.bad_tokens = BadTokens(current_platform.device_type)
        self.config, self._layers = config, config.compilation_config.static_forward_context
        self._members: list[Any] = []
        self._recipes: dict[int, Recipe] = {}
        self._attentions: dict[tuple[Any, ...], BlockAttention] = {}
        self._slab_bytes: dict[int, int] = {}
        self._logged = False

    @classmethod
    def joined(cls, impl: Any, config: Any, kv_cache_dtype: str) -> "ModelSetup":
        """Add a layer's attention to the setup of its engine's model, which is the same for all layers, and return it.

        Raises
        ------
        UsageError : if the options are not accepted.
        """
        setup = cls.newest
        if setup is None or setup._layers is not config.compilation_config.static_forward_context:
            setup = cls.newest = cls(config, kv_cache_dtype)
        setup._members.append(impl)
        return setup

    def slab_bytes(self, head_dim: int) -> int:
        """Return the bytes of one KV head's page, which all layers with such heads share."""
        return self._slab_bytes[head_dim]

    def layer(self, name: str) -> Any:
        """Return vLLM's layer of a name."""
        return self._layers[name]

    def name_of(self, impl: Any) -> str:
        """Return the name of the layer that has this attention."""
        return next(name for name, layer in self._layers.items() if getattr(layer, "impl", None) is impl)

    def recipe_of_layer(self, name: str, shape: AttentionShape, act_dtype: torch.dtype) -> Recipe:
        """Return a layer's recipe; the first call decides all layers'.

        Raises
        ------
        UsageError : if the option `layers` or the calibration does not fit the model.
        """
        if not self._recipes:
            self._recipes = layer_recipes(self.options, self.recipe, self._numbers(), self._served_model(shape, act_dtype))
        if shape.head_dim not in self._slab_bytes:
            # Of all ranks' layers, so that the size is the same on all ranks.
            plan = SlabPlan.of(self._recipes.values(), shape)
            self._slab_bytes[shape.head_dim] = plan.slab_bytes
            if plan.wasted_bytes:
                _log.info("ElasticKV: %s", plan)
        return self._recipes.get(extract_layer_index(name), self.recipe)

    def _numbers(self) -> list[int]:
        return sorted({extract_layer_index(self.name_of(impl)) for impl in self._members})

    def _served_model(self, shape: AttentionShape, act_dtype: torch.dtype) -> ServedModel:
        model, fingerprint = self.config.model_config, None
        if self.options.calibration is not None:
            folder = checkpoint_folder(model.model, model.revision, self.config.load_config.download_dir)
            fingerprint = checkpoint_fingerprint(folder, model.hf_text_config) if folder is not None else None
        query_heads = model.model_arch_config.total_num_attention_heads
        return ServedModel(
            shape=AttentionShape(1, query_heads, model.get_total_num_kv_heads(), shape.head_dim),
            layer_count=model.get_total_num_hidden_layers(),
            context=model.max_model_len,
            dtype=DTYPES[act_dtype],
            fingerprint=fingerprint,
        )

    def attention(self, shape: AttentionShape, act_dtype: torch.dtype, recipe: Recipe, scale: float) -> BlockAttention:
        """Return the kernels of a shape and recipe, which layers share.

        Raises
        ------
        UsageError : if no kernel supports the combination.
        """
        key = (shape, act_dtype, recipe, scale)
        if key not in self._attentions:
            if current_platform.is_cpu():
                from elastickv.vllm.cpu_attention import CpuAttention

                self._attentions[key] = CpuAttention(shape, DTYPES[act_dtype], recipe, scale)
            else:
                from elastickv.vllm.cuda_attention import CudaAttention

                self._attentions[key] = CudaAttention(shape, DTYPES[act_dtype], recipe, scale, self.config)
        return self._attentions[key]

    def add_window(self, name: str, shape: AttentionShape, act_dtype: torch.dtype, attention: BlockAttention) -> WindowCache:
        """Give a layer its window, as a layer of vLLM's."""
        assert attention.slab_bytes <= self._slab_bytes[shape.head_dim], "a page would reach into the next"
        window = WindowShape(
            slab_bytes=self._slab_bytes[shape.head_dim],
            tokens=self.options.window,
            kv_heads=shape.kv_heads,
            head_size=shape.head_dim,
            dtype=act_dtype,
            soft=self.options.prefix_reuse == "soft",
        )
        share_blocks(self.config, list(self._layers.values()), window.block_bytes(PAGE_TOKENS))
        cache = self._layers[name + SUFFIX] = WindowCache(window, attention, self._bound)
        return cache

    def _bound(self, cache: WindowCache) -> None:
        """Check and report the memory that vLLM allocated, once.

        Raises
        ------
        UsageError : if vLLM padded the pages to the size of 16 bit.
        """
        blocks, stride = cache.kv_cache.shape[0], cache.kv_cache.stride(0)
        most_requests = self.config.scheduler_config.max_num_seqs
        graphs = self.config.compilation_config.max_cudagraph_capture_size or 0
        # With one block a request, vLLM only finds out how much memory its graphs take.
        if self._logged or blocks == min(most_requests, graphs):
            return
        self._logged = True
        layers = sum(isinstance(layer, WindowCache) for layer in self._layers.values())
        longest = self.config.model_config.max_model_len
        # Beside layers with larger pages vLLM takes more tokens a block, or pads it where no whole number of times fits.
        times, padding = divmod(stride, cache.shape.block_bytes(cache.page_block_tokens))
        block_tokens = cache.page_block_tokens * (1 if padding else times)
        capacity = Capacity(cache.shape, block_tokens, layers, blocks - 1, longest)
        block_bytes, dense_bytes = capacity.block_bytes, capacity.dense_block_bytes
        if padding and stride >= dense_bytes:
            raise UsageError(
                f"vLLM padded blocks of {block_bytes:,} B to {stride:,} B, no less than the {dense_bytes:,} B of 16 bit, for "
                "layers of another backend: leave out ElasticKV's `attention_backend` and `kv_cache_dtype`"
            )
        if padding:
            _log.warning("ElasticKV: vLLM padded blocks of %d B to %d B: capacity is lost", block_bytes, stride)
        _log.info("ElasticKV: %s", capacity)
