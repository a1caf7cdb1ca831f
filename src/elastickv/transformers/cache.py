"""`ElasticCache`, which replaces the cache of `generate`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from elastickv.errors import UsageError
from elastickv.inputs import file_path
from elastickv.recipe import Recipe
from elastickv.recipe.calibration import ModelCalibration
from elastickv.transformers import serialization
from elastickv.transformers.attention import breaks_graph
from elastickv.transformers.cache_checks import CacheChecks, NotPicklable, check_same_length
from elastickv.transformers.cache_report import CacheReport, Ledger, report_of
from elastickv.transformers.config import ElasticConfig, RecipeLike, config_for
from elastickv.transformers.cuda_graph.captured import Captured
from elastickv.transformers.cuda_graph.decode_protocol import DecodeLayer
from elastickv.transformers.cuda_graph.model_patch import install, uncompiled
from elastickv.transformers.generation_settings import planned_positions
from elastickv.transformers.layer import ElasticLayer
from elastickv.transformers.layer_storage import Backends
from elastickv.transformers.model_loading import fingerprint
from elastickv.transformers.model_support import device_kind, sizes_of, stock_layers, text_config


class ElasticCache(Cache):  # type: ignore[misc]
    """A KV cache with a byte budget, for models of Hugging Face Transformers.

    Create it with `for_model`. Layers that attend to the whole context are elastic; windowed layers keep Transformers' own
    cache. One cache serves one model and the batch that first fills it. Each rank of a model that is split (`tp_plan`) makes
    its own with the same arguments. The length that Transformers reads counts padding, which is neither stored nor scored.
    """

    def __init__(
        self, layers: list[Any], config: ElasticConfig, checks: CacheChecks, ledger: Ledger, captured: Captured
    ) -> None:
        super().__init__(layers=layers)
        self._config, self._checks, self._ledger, self._captured = config, checks, ledger, captured

    @classmethod
    def for_model(
        cls,
        model: Any,
        compress: float | None = None,
        *,
        recipe: RecipeLike | Path | Mapping[int, RecipeLike] | Sequence[RecipeLike] | None = None,
        layers: Mapping[int, RecipeLike] | None = None,
        stored_bits: float | None = None,
        calibration: ModelCalibration | Path | str | None = None,
        context: int | None = None,
        capacity: int | None = None,
        prefill: str = "stored",
        capture: bool = True,
    ) -> ElasticCache:
        """Return an empty cache for a model, and set the model's attention implementation to 'elastickv'.

        That implementation is the framework's own fast attention wherever no elastic cache is used, so the model still works
        with every other cache. `ekv.elastic` restores the former implementation when done, `ekv.release(model)` at any time.

        Parameters
        ----------
        compress : C: decodes read at most 1/C of the bytes of a dense 16-bit cache. 1 keeps and reads everything in the model's
            own dtype.
        recipe : instead of `compress`, what is stored and read: a `Recipe`, its text, one for each full-attention layer, a
            mapping from layer numbers, or a file. A text may leave a number open for `compress` to decide ('int4,pages').
        layers : recipes of single layers, which override the others.
        stored_bits : instead of `compress`: bits an element, mean over elastic layers, scales and zeros included. Each layer
            gets formats of the calibration, so that all together err least within it. Sinks and window stay in 16 bit, are not
            counted, and everything is read.
        calibration : the output of `elastickv calibrate`, or its file; needs `compress`, `stored_bits`, or a recipe that
            rotates keys, which are smoothed as it says, or that has `rounding=gptq`.
        context : tokens from which on `compress` holds; recipes are solved for exactly that context. None: they are solved for
            the prompt, and the share of pages follows the growing context.
        capacity : tokens that a sequence may have, reserved with the prompt. None: as many as `generate` needs, growing.
        prefill : 'stored': later chunks of a prompt read earlier ones as they are stored; 'exact': a prompt stays in the
            model's dtype until its first single-token pass.
        capture : on a CUDA device, replay decodes as captured graphs, for which the instance gets its own `forward`. False: run
            them operation by operation.

        Raises
        ------
        UsageError : if the model cannot be served, with the reason, or the arguments contradict each other.
        """
        model = uncompiled(model)
        sizes = sizes_of(model)
        config = config_for(sizes, compress, recipe, layers, calibration, context, capacity, prefill, stored_bits)
        config.device = device_kind(model)
        if config.calibration is not None:
            config.calibration.check_model(fingerprint(model), type(model).__name__)
        if config.stored_bits is not None:
            config.budget_for(config.usual, "bf16")  # refuses too few bits before a prompt is read
        config.warn_uncalibrated(getattr(model.config, "_name_or_path", "") or "MODEL")
        if not sizes.elastic:
            config.warn_windowed(type(model).__name__)
        install(model, capture)
        return cls._made(model, config, capture)

    @classmethod
    def _made(cls, model: Any, config: ElasticConfig, capture: bool) -> ElasticCache:
        elastic = config.sizes.elastic
        checks, ledger = CacheChecks(model), Ledger(elastic[0] if elastic else 0)
        stock = stock_layers(text_config(model))
        made = [ElasticLayer(n, config, checks, ledger) if n in elastic else layer for n, layer in enumerate(stock)]
        return cls(made, config, checks, ledger, Captured(checks, capture))

    def another(self) -> ElasticCache:
        """Return an empty cache for the same model, made with the same arguments.

        Raises
        ------
        UsageError : if the model is gone.
        """
        model = self._checks.model
        if model is None:
            raise UsageError("the model that the cache was made for is gone: make one with ElasticCache.for_model(model)")
        config = self._config.copy()
        config.forget()
        return self._made(model, config, self._captured.wanted)

    @property
    def elastic_layers(self) -> list[ElasticLayer]:
        """The layers that are not Transformers' own."""
        return [layer for layer in self.layers if isinstance(layer, ElasticLayer)]

    @property
    def recipes(self) -> dict[int, Recipe]:
        """Layer -> recipe in force. Empty until the first prompt determines them."""
        budget = self._config.budget
        return {} if budget is None else {layer: budget.recipe_at(layer, max(1, self._longest)) for layer in budget.recipes}

    @property
    def _longest(self) -> int:
        return max(self.lengths, default=0)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence, padding not counted."""
        for layer in self.elastic_layers:
            return tuple(int(n) for n in layer.lengths) if layer.padding.length else ()
        return ()

    @breaks_graph
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new keys and values to a layer; see `Cache.update`."""
        if layer_idx >= len(self.layers):
            raise UsageError(
                f"the cache was made for another model: {self._checks.model_name} has {len(self.layers)} layers, and this "
                f"one has a layer {layer_idx}"
            )
        attending = [number for number, layer in enumerate(self.layers) if isinstance(layer, CacheLayerMixin)]
        if layer_idx == attending[0]:
            self._checks.check_answered()
            check_same_length(self.layers[number].get_seq_length() for number in attending)
        taken: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return taken

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the positions so far, padding included. The model's positions and masks start from there."""
        if not torch.compiler.is_compiling():
            planned = planned_positions(sys._getframe(1), super().get_seq_length())
            if planned is not None:
                self._config.expect(*planned)
        positions: int = self._positions(layer_idx)
        return positions

    @breaks_graph
    def _positions(self, layer_idx: int) -> int:
        self._checks.check_answered()
        self._checks.note_length_read()
        return int(super().get_seq_length(layer_idx))

    @breaks_graph
    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the first query position of a mask: the positions so far, padding included."""
        self._checks.check_answered()
        return int(super().get_seq_length(layer_idx))

    @breaks_graph
    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return (keys, first key) that a layer's mask has to cover; see `Cache.get_mask_sizes`."""
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes

    def reset(self) -> None:
        """Forget everything and free the memory. The cache can then be filled again."""
        for number, fresh in enumerate(stock_layers(self._checks.model_config)):
            if isinstance(self.layers[number], ElasticLayer):
                self.layers[number].reset()
            else:
                # In some releases, reset stock layers remember the shape of their former contents.
                self.layers[number] = fresh
        self._config.forget()
        self._checks.forget()
        self._ledger.forget()
        self._captured.forget()

    @property
    def is_initialized(self) -> bool:
        """Whether every layer holds tokens."""
        return all(getattr(layer, "is_initialized", True) for layer in self.layers)

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]:
        """Yield for each layer, as Transformers' own cache does, keys and values, and the size of the window or None.

        Those of elastic layers are what their codes stand for, in the model's dtype: (batch, kv_heads, positions, head_dim).
        Padding is zero.

        Raises
        ------
        UsageError : if a stride has dropped tokens.
        """
        for layer in self.layers:
            if isinstance(layer, ElasticLayer):
                yield *layer.dequantized(), None
            else:
                names = ("keys", "values", "_sliding_window_tensor")
                keys, values, window = (getattr(layer, name, None) for name in names)
                yield keys, values, window

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled: a cache refers to its model, and its tokens may be in a device's memory."""
        raise NotPicklable

    def __copy__(self) -> ElasticCache:
        """Return a cache with the same layers."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> ElasticCache:
        import copy

        config, checks, ledger = self._config.copy(), self._checks.copy(), self._ledger.copy()
        layers = [
            layer.copy(config, checks, ledger) if isinstance(layer, ElasticLayer) else copy.deepcopy(layer, memo)
            for layer in self.layers
        ]
        return type(self)(layers, config, checks, ledger, self._captured.copy(checks))

    def captured_decode(self, model: Any, forward: Callable[..., Any], inputs: dict[str, Any], takes_positions: bool) -> Any:
        """Return the outputs of a model's `forward` for `inputs`, replaying a captured graph if possible."""
        return self._captured(self, model, forward, inputs, takes_positions)

    @property
    def backends(self) -> Backends:
        """Where the layers are stored."""
        return self._config.backends

    @property
    def has_room(self) -> bool:
        """Whether another token is expected, as far as the running `generate` is known, and fits the allocated memory."""
        layers, expected = self.elastic_layers, self._config.expected
        ends = expected is not None and layers[0].padding.length >= expected
        return not ends and all(layer.store is not None and layer.store.room for layer in layers)

    def begin_step(self, layers: list[ElasticLayer] | None = None) -> None:
        """Prepare all elastic layers, or `layers`, for one more token a row, and set what its decode reads.

        Raises
        ------
        UsageError : if there is no room for it, or the previous pass stopped halfway.
        """
        layers = layers or self.elastic_layers
        self._checks.check_answered()
        check_same_length(layer.padding.length for layer in layers)
        layers[0].check_room(None, layers[0].batch, 1)
        reading = self._config.reading(int(layers[0].lengths.max()) + 1)
        for layer in layers:
            layer.begin_step(reading)

    def end_step(self, layers: Sequence[DecodeLayer]) -> None:
        """Count the tokens that `layers` have stored.

        Raises
        ------
        NonFiniteError : at every 32nd step, if a NaN or infinity was stored.
        """
        for layer in layers:
            layer.end_step()
        if layers and layers[0].check_is_due:
            for layer in layers:
                layer.raise_non_finite()

    def rollback(self) -> None:
        """Undo steps that layers have queued and not counted."""
        for layer in self.elastic_layers:
            if layer.store is not None:
                layer.store.rollback_step()

    take_back = rollback  # its former name

    @property
    def allocated_bytes(self) -> int:
        """Memory that the elastic layers hold in this process, including spare room and scratch."""
        total = 0
        for layer in self.elastic_layers:
            if layer.store is not None:
                total += layer.store.cache.allocated_bytes
            if layer.held is not None:
                total += sum(tensor.nbytes for tensor in layer.held)
        return total

    def report(self) -> CacheReport:
        """Return what the cache holds and has read, and the ratio by context. Print the report to see a table.

        Raises
        ------
        NonFiniteError : if a NaN or infinity was ever stored.
        """
        for layer in self.elastic_layers:
            layer.raise_non_finite()
        return report_of(
            self._config,
            self._ledger,
            [layer for layer in self.layers if not isinstance(layer, ElasticLayer)],
            self.lengths,
            allocated_bytes=self.allocated_bytes,
            captured=self._captured.count,
            not_captured=self._captured.reason,
            ahead=self._captured.speculative.count,
            ranks=self._checks.ranks.count,
        )

    def save(self, path: Path | str) -> None:
        """Write the cache to a safetensors file, which `load` reads.

        Raises
        ------
        UsageError : if a layer cannot be saved, the model is split over ranks, or the file cannot be written.
        """
        serialization.save(file_path(path), self._checks.model, self._config, self.layers)

    @classmethod
    def load(cls, path: Path | str, model: Any, capture: bool = True) -> ElasticCache:
        """Return the cache that `save` wrote, for the model that it was made for; `capture` as in `for_model`.

        Raises
        ------
        UsageError : if the file is no saved cache, is damaged, or belongs to another model; if the model is split over ranks.
        """
        model = uncompiled(model)
        saved = serialization.load(file_path(path), model)
        cache = cls._made(model, saved.config, capture)
        saved.restore(cache.layers)
        install(model, capture)
        return cache

    def __repr__(self) -> str:
        config = self._config
        target = f"compress={config.ratio:g}" if config.ratio is not None else "recipes"
        layers = f"{len(self.elastic_layers)} of {len(self.layers)} layers elastic"
        return f"ElasticCache({target}, {layers}, tokens {list(self.lengths)})"
