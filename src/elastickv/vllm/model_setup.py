"""What the layers of a model share: page formats, kernels, the size of a slab, and the lines logged at the start."""

import logging
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from elastickv.errors import UsageError
from elastickv.recipe import AttentionShape, Recipe
from elastickv.recipe.calibration import Smoothing
from elastickv.recipe.formats import PAGE_TOKENS
from elastickv.transformers.torch_dtypes import DTYPE_NAMES
from elastickv.vllm.bad_tokens import BadTokens, count_nans
from elastickv.vllm.block_attention import BlockAttention
from elastickv.vllm.capacity import Capacity, GraphMemory
from elastickv.vllm.checkpoint_fingerprint import checkpoint_fingerprint, checkpoint_folder
from elastickv.vllm.drafts import draft_layers
from elastickv.vllm.layer_formats import (
    ServedModel,
    SlabPlan,
    layer_recipes,
    layer_smoothing,
    selection_line,
    uncalibrated,
    with_calibration_hash,
)
from elastickv.vllm.selection.ratio_shares import RatioShares
from elastickv.vllm.serving_options import ServingOptions, recipe_of
from elastickv.vllm.step_metadata import most_requests
from elastickv.vllm.stock_windows import share_blocks
from elastickv.vllm.window_cache import WindowCache, WindowShape, window_name

if TYPE_CHECKING:  # it loads the kernels of CPUs
    from elastickv.vllm.selection.decode_selection import DecodeSelection
    from elastickv.vllm.selection.device_selection import DeviceLayerSelection, DeviceSelection
    from elastickv.vllm.selection.row_writer import RowWriter

_log = logging.getLogger("vllm.elastickv")


class ModelSetup:
    """The layers of one engine's model on this rank, and of its drafter.

    Attributes
    ----------
    options : the user's.
    kv_cache_dtype, recipe : of layers for which nothing says another, and of a drafter's.
    config : vLLM's.
    bad_tokens : words in which kernels report what cannot be stored.
    newest : of the model built last in this process. vLLM asks the backend for the specification of a layer's pages
        (`customize_spec`) without saying which model's.
    """

    _newest: ClassVar[weakref.ref["ModelSetup"] | None] = None  # weak, so that a closed engine's memory is freed

    def __init__(self, config: Any, kv_cache_dtype: str) -> None:
        # vLLM's hash, which names its compiled graphs, must change with the calibration's content.
        config.additional_config = with_calibration_hash(config.additional_config)
        self.options = ServingOptions.parse(config.additional_config) or ServingOptions()
        count_nans()
        self.kv_cache_dtype, self.recipe = kv_cache_dtype, recipe_of(self.options, kv_cache_dtype)
        self.config, self._layers = config, config.compilation_config.static_forward_context
        self.bad_tokens = BadTokens(current_platform.device_type, most_requests(config), self._layers)
        self._members: list[Any] = []
        self._drafter: list[Any] = []
        self._recipes: dict[int, Recipe] = {}
        self._shares: RatioShares | None = None
        self._device_selection: DeviceSelection | None = None
        self._served: ServedModel | None = None
        self._smoothing: dict[int, Smoothing] = {}
        self._attentions: dict[tuple[Any, ...], BlockAttention] = {}
        self._slab_bytes: dict[int, int] = {}
        self._reported: list[WindowShape] = []

    @classmethod
    def newest(cls) -> "ModelSetup | None":
        """Return the setup of the engine that was started last, while its layers exist."""
        return cls._newest() if cls._newest is not None else None

    @classmethod
    def joined(cls, impl: Any, config: Any, kv_cache_dtype: str) -> "ModelSetup":
        """Return the setup of a layer's model, with the layer's attention in it; the first layer of a model makes it.

        Layers that come once the model's weights are loaded are a drafter's.

        Raises
        ------
        UsageError : if the options are not accepted.
        """
        setup = cls.newest()
        if setup is None or setup._layers is not config.compilation_config.static_forward_context:
            setup = cls(config, kv_cache_dtype)
            cls._newest = weakref.ref(setup)
        (setup._drafter if setup._recipes else setup._members).append(impl)
        return setup

    @property
    def served_recipes(self) -> dict[int, Recipe]:
        """The recipes of the layers that ElasticKV serves on this rank, by their numbers; a drafter's are not among them."""
        return {number: self._recipes.get(number, self.recipe) for number in self._numbers()}

    def slab_bytes(self, head_dim: int) -> int:
        """Return the bytes of one KV head's page, which all layers with such heads share."""
        return self._slab_bytes[head_dim]

    def layer(self, name: str) -> Any:
        """Return vLLM's layer of a name."""
        return self._layers[name]

    def name_of(self, impl: Any) -> str:
        """Return the name of the layer that has this attention."""
        return next(name for name, layer in self._layers.items() if getattr(layer, "impl", None) is impl)

    def of_drafter(self, name: str) -> bool:
        """Whether a layer is a drafter's."""
        return any(self._layers[name].impl is each for each in self._drafter)

    def is_last(self, name: str) -> bool:
        """Whether a layer is the last that ElasticKV serves of this rank's part of the model; a drafter's do not count."""
        last = max(self._members, key=lambda impl: extract_layer_index(self.name_of(impl)))
        return self._layers[name].impl is last

    def recipe_of_layer(self, name: str, shape: AttentionShape, act_dtype: torch.dtype) -> Recipe:
        """Return a layer's recipe; the first call decides all layers'.

        Raises
        ------
        UsageError : if the option `layers` or the calibration does not fit the model.
        """
        if not self._recipes:
            self._served = self._served_model(shape, act_dtype)
            self._recipes = layer_recipes(self.options, self.recipe, self._numbers(), self._served)
            self._shares = RatioShares(self._recipes, self._served)
            self._tell_selection(self._served)
            self._smoothing = layer_smoothing(self.options)
        if shape.head_dim not in self._slab_bytes:
            # Of all ranks' layers, and of a drafter's, so that the size is the same on all ranks.
            plan = SlabPlan.of([*self._recipes.values(), *[self.recipe] * draft_layers(self.config)], shape)
            self._slab_bytes[shape.head_dim] = plan.slab_bytes
            if plan.wasted_bytes:
                _log.info("ElasticKV: %s", plan)
        # A drafter's layers have numbers of their own, or those that follow the model's.
        return self.recipe if self.of_drafter(name) else self._recipes.get(extract_layer_index(name), self.recipe)

    def _tell_selection(self, served: ServedModel) -> None:
        """Log what a selection of pages reads, and loses where nothing is calibrated."""
        selecting = [recipe for recipe in self._recipes.values() if recipe.selection == "pages"]
        if not selecting or get_tensor_model_parallel_rank() > 0:
            return
        _log.info("ElasticKV: %s", selection_line(self._recipes, served))
        if self.options.calibration is None:
            _log.warning("ElasticKV: %s", uncalibrated(self.options, selecting[0], served))

    def smoothing_of_layer(self, name: str, recipe: Recipe) -> Smoothing | None:
        """Return the smoothing of a layer, of all KV heads; None where the recipe does not rotate keys."""
        if not recipe.rotates_keys or self.of_drafter(name):
            return None
        return self._smoothing.get(extract_layer_index(name))

    @property
    def selects_pages(self) -> bool:
        """Whether layers read selected pages."""
        return any(recipe.selection == "pages" for recipe in self._recipes.values())

    def selection_of_layer(self, name: str, recipe: Recipe, kv_heads: int) -> "DecodeSelection | DeviceLayerSelection | None":
        """Return which pages a layer's decodes read; None: every page."""
        if recipe.selection != "pages":
            return None
        assert self._shares is not None, "layers have recipes"
        layer, layers = extract_layer_index(name), self.config.model_config.get_total_num_hidden_layers()
        heads, offset = self._heads_of_rank(kv_heads), recipe.layer_anchor_offset(layer, layers)
        drafts, requests = self.config.num_speculative_tokens, self.config.scheduler_config.max_num_seqs
        if current_platform.is_cpu():
            from elastickv.vllm.selection.decode_selection import DecodeSelection

            return DecodeSelection(recipe, partial(self._shares.of_layer, layer), heads, offset, drafts, requests)
        if self._device_selection is None:
            from elastickv.vllm.selection.device_selection import DeviceSelection

            pages = -(-self.config.model_config.max_model_len // PAGE_TOKENS)
            self._device_selection = DeviceSelection(self._shares.of_layer, requests, drafts, pages)
        return self._device_selection.add_layer(layer, recipe, heads, offset)

    def rows_for(self, requests: int, device: torch.device) -> "RowWriter | None":
        """Return the memory of what kernels that select pages read of up to `requests` requests; None on a CPU."""
        if self._device_selection is None:
            return None
        from elastickv.vllm.selection.row_writer import RowWriter

        return RowWriter(self._device_selection, requests, device)

    def of_this_rank(self, smoothing: Smoothing | None, kv_heads: int) -> Smoothing | None:
        """Return the part of a layer's smoothing that is of this rank's KV heads."""
        heads = self._heads_of_rank(kv_heads)
        return None if smoothing is None else smoothing[heads.start : heads.stop]

    def _heads_of_rank(self, kv_heads: int) -> range:
        """Return the numbers of this rank's KV heads, of which there are so many."""
        # With more ranks than heads, vLLM gives each head to several ranks.
        first = get_tensor_model_parallel_rank() * self.config.model_config.get_total_num_kv_heads()
        first //= self.config.parallel_config.tensor_parallel_size
        return range(first, first + kv_heads)

    def _numbers(self) -> list[int]:
        return sorted({extract_layer_index(self.name_of(impl)) for impl in self._members})

    def _served_model(self, shape: AttentionShape, act_dtype: torch.dtype) -> ServedModel:
        model, fingerprint = self.config.model_config, None
        if self.options.calibration is not None:
            folder = checkpoint_folder(model.model, model.revision, self.config.load_config.download_dir)
            fingerprint = checkpoint_fingerprint(folder, model.hf_text_config) if folder is not None else None
        device = "cpu" if current_platform.is_cpu() else "cuda"
        return ServedModel.of(self.config, shape.head_dim, DTYPE_NAMES[act_dtype], device, fingerprint)

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

                self._attentions[key] = CpuAttention(shape, DTYPE_NAMES[act_dtype], recipe, scale)
            else:
                from elastickv.vllm.cuda_attention import CudaAttention

                self._attentions[key] = CudaAttention(shape, DTYPE_NAMES[act_dtype], recipe, scale, self.config)
        return self._attentions[key]

    def add_window(
        self,
        layer: str,
        shape: AttentionShape,
        act_dtype: torch.dtype,
        recipe: Recipe,
        attention: BlockAttention,
        smoothing: Smoothing | None,
    ) -> WindowCache:
        """Give a layer its window, as a layer of vLLM's.

        Parameters
        ----------
        smoothing : of all KV heads: vLLM groups layers by their names, which must be the same on all ranks.
        """
        assert attention.slab_bytes <= self._slab_bytes[shape.head_dim], "a page would reach into the next"
        window = WindowShape(
            slab_bytes=self._slab_bytes[shape.head_dim],
            tokens=self.options.window,
            kv_heads=shape.kv_heads,
            head_size=shape.head_dim,
            dtype=act_dtype,
            soft=self.options.prefix_reuse == "soft",
            selects=self.selects_pages,
        )
        share_blocks(self.config, list(self._layers.values()), window.block_bytes(PAGE_TOKENS))
        name = window_name(layer, recipe, window, smoothing)
        cache = self._layers[name] = WindowCache(name, window, attention, self._bound)
        return cache

    def _bound(self, cache: WindowCache) -> None:
        """Check and report the memory that vLLM allocated, once for each shape of layers.

        Raises
        ------
        UsageError : if vLLM padded the pages to the size of 16 bit.
        """
        blocks, stride = cache.kv_cache.shape[0], cache.kv_cache.stride(0)
        # Before its worker knows a number of blocks, vLLM only finds out how much memory its graphs take.
        if cache.shape in self._reported or self.config.cache_config.num_gpu_blocks is None:
            return
        self._reported.append(cache.shape)
        windows = [layer.shape for layer in self._layers.values() if isinstance(layer, WindowCache)]
        longest = self.config.model_config.max_model_len
        # Beside layers with larger pages vLLM takes more tokens a block, or pads it where no whole number of times fits.
        times, padding = divmod(stride, cache.shape.block_bytes(cache.page_block_tokens))
        block_tokens = cache.page_block_tokens * (1 if padding else times)
        capacity = Capacity(cache.shape, block_tokens, windows.count(cache.shape), blocks - 1, longest, len(set(windows)))
        block_bytes, dense_bytes = capacity.block_bytes, capacity.dense_block_bytes
        if padding and stride >= dense_bytes:
            raise UsageError(
                f"vLLM padded blocks of {block_bytes:,} B to {stride:,} B, no less than the {dense_bytes:,} B of 16 bit, for "
                "layers of another backend: leave out ElasticKV's `attention_backend` and `kv_cache_dtype`"
            )
        if padding:
            _log.warning("ElasticKV: vLLM padded blocks of %d B to %d B: capacity is lost", block_bytes, stride)
        _log.info("ElasticKV: %s", capacity)
        GraphMemory().start()
