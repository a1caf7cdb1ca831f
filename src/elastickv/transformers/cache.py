"""`ElasticCache`: what `generate` takes in place of its own cache."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import Cache

from elastickv.errors import UsageError
from elastickv.recipe import Recipe
from elastickv.recipe.calibration import ModelCalibration
from elastickv.transformers.checks import CacheChecks
from elastickv.transformers.config import ElasticConfig, RecipeLike, plan_for
from elastickv.transformers.cuda_graph.captured import Captured
from elastickv.transformers.cuda_graph.model_patch import install
from elastickv.transformers.layer import ElasticLayer
from elastickv.transformers.layer_storage import Backends
from elastickv.transformers.model_loading import fingerprint
from elastickv.transformers.model_support import sizes_of, stock_layers, text_config
from elastickv.transformers.report import CacheReport, Ledger, by_context, held_bytes


class ElasticCache(Cache):  # type: ignore[misc]
    """A KV cache with a byte budget, for models of Hugging Face Transformers.

    Made by `for_model`. Layers that attend to the whole context are elastic; windowed layers keep Transformers' own.
    One cache serves one model and the batch that first fills it. Each rank of a model that is split (`tp_plan`) makes its own,
    with the same arguments. What Transformers calls its length counts padding, which is neither stored nor scored.
    """

    def __init__(self, layers: list[Any], plan: ElasticConfig, guard: CacheChecks, ledger: Ledger, captured: Captured) -> None:
        super().__init__(layers=layers)
        self._plan, self._guard, self._ledger, self._captured = plan, guard, ledger, captured

    @classmethod
    def for_model(
        cls,
        model: Any,
        compress: float | None = None,
        *,
        recipe: RecipeLike | Path | Mapping[int, RecipeLike] | Sequence[RecipeLike] | None = None,
        layers: Mapping[int, RecipeLike] | None = None,
        calibration: ModelCalibration | Path | str | None = None,
        context: int | None = None,
        capacity: int | None = None,
        prefill: str = "stored",
        capture: bool = True,
    ) -> ElasticCache:
        """Return an empty cache for a model, and set the model's attention implementation to 'elastickv'.

        That implementation is the framework's own fast attention wherever no elastic cache is in play, so the model goes on
        working with every other cache; `ekv.elastic` restores it when done, and `ekv.release(model)` at any time.

        Parameters
        ----------
        compress : C: decodes read at most 1/C of the bytes of a dense 16-bit cache. 1 keeps and reads everything, in the
            model's own dtype.
        recipe : instead of `compress`, what is stored and read: a `Recipe`, its text, one for each full-attention layer, a
            mapping of layer numbers, or a file. A text may leave a number open for `compress` to decide ('int4,pages').
        layers : recipes of single layers, whatever the others have.
        calibration : what `elastickv calibrate` wrote, or its file; with `compress`.
        context : tokens from which on `compress` holds, with recipes solved for just that context. None: they are solved for
            the prompt, and the share of pages follows the context as it grows.
        capacity : tokens that a sequence may have, reserved with the prompt. None: what `generate` is asked for, growing.
        prefill : 'stored': chunks after the first read what is stored of those before; 'exact': a prompt stays in the model's
            dtype until its first single-token pass.
        capture : on a CUDA device, replay decodes as captured graphs; the instance gets a `forward` of its own for it. False:
            run them operation by operation.

        Raises
        ------
        UsageError : if the model cannot be served, telling why, or the arguments do not go together.
        """
        sizes = sizes_of(model)
        plan = plan_for(sizes, compress, recipe, layers, calibration, context, capacity, prefill)
        if plan.calibration is not None:
            plan.calibration.check_model(fingerprint(model), type(model).__name__)
        plan.warn_uncalibrated(getattr(model.config, "_name_or_path", "") or "MODEL")
        if not sizes.elastic:
            plan.warn_windowed(type(model).__name__)
        install(model, capture)
        return cls._made(model, plan, capture)

    @classmethod
    def _made(cls, model: Any, plan: ElasticConfig, capture: bool) -> ElasticCache:
        elastic = plan.sizes.elastic
        guard, ledger = CacheChecks(model), Ledger(elastic[0] if elastic else 0)
        stock = stock_layers(text_config(model))
        made = [ElasticLayer(n, plan, guard, ledger) if n in elastic else layer for n, layer in enumerate(stock)]
        return cls(made, plan, guard, ledger, Captured(guard, capture))

    def another(self) -> ElasticCache:
        """Return an empty cache for the same model, made with the same arguments.

        Raises
        ------
        UsageError : if the model is gone.
        """
        model = self._guard.model
        if model is None:
            raise UsageError("the model that the cache was made for is gone: make one with ElasticCache.for_model(model)")
        plan = self._plan.copy()
        plan.forget()
        return self._made(model, plan, self._captured.wanted)

    @property
    def elastic_layers(self) -> list[ElasticLayer]:
        """The layers that are not Transformers' own."""
        return [layer for layer in self.layers if isinstance(layer, ElasticLayer)]

    @property
    def recipes(self) -> dict[int, Recipe]:
        """Layer -> recipe in force; empty until the first prompt has settled them."""
        budget = self._plan.budget
        return {} if budget is None else {layer: budget.recipe_at(layer, max(1, self._longest)) for layer in budget.recipes}

    @property
    def _longest(self) -> int:
        return max(self.lengths, default=0)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence, padding not counted."""
        for layer in self.elastic_layers:
            return tuple(int(n) for n in layer.lengths) if layer.slots.length else ()
        return ()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new keys and values of a layer; see `Cache.update`."""
        if layer_idx >= len(self.layers):
            raise UsageError(
                f"the cache was made for another model: {self._guard.model_name} has {len(self.layers)} layers, and layer "
                f"{layer_idx} is asked for"
            )
        elastic = self._plan.sizes.elastic
        if elastic and layer_idx == elastic[0]:
            self._guard.check_answered()
            self._guard.check_whole(self.elastic_layers)
        taken: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return taken

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the places so far, padding included: what positions and masks start from."""
        self._guard.check_answered()
        self._guard.note_length_read()
        self._look_ahead(sys._getframe(1))
        return int(super().get_seq_length(layer_idx))

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return what a mask's queries start from: the places so far. Elastic layers ask no mask where their tokens are."""
        self._guard.check_answered()
        return int(super().get_seq_length(layer_idx))

    def _look_ahead(self, caller: FrameType) -> None:
        """Note how long the running `generate` will go on.

        Transformers tells a cache nothing of it. It asks for the length once before the prompt, from a function that has the
        generation's configuration at hand: read there, a prompt that will not fit is refused before any work, and room is made
        once. Where that function is not met, the cache grows and refuses as it goes.
        """
        if caller.f_code.co_name != "_prefill":
            return
        known = caller.f_locals
        config, inputs, kwargs = known.get("generation_config"), known.get("input_ids"), known.get("model_kwargs") or {}
        if config is None or not isinstance(inputs, torch.Tensor) or not isinstance(getattr(config, "max_length", None), int):
            return
        mask = kwargs.get("attention_mask")
        padding = int((mask == 0).sum(dim=1).min()) if isinstance(mask, torch.Tensor) and mask.dim() == 2 else 0
        covered = mask.shape[1] if isinstance(mask, torch.Tensor) else getattr(config, "_mask_length", -1)
        places = max(covered, inputs.shape[1])
        held = super().get_seq_length()
        if held and covered == inputs.shape[1] and places <= held:
            raise UsageError(
                f"the cache already holds {held} tokens and the prompt has {places}: a later turn repeats what came before and "
                "adds to it; reset() the cache for another text"
            )
        # The last token that is generated is never given to the model.
        self._plan.expect(config.max_length - inputs.shape[1] + places - 1, padding)

    def reset(self) -> None:
        """Forget everything and free the memory; the cache can then be filled anew."""
        for number, fresh in enumerate(stock_layers(self._guard.config)):
            if isinstance(self.layers[number], ElasticLayer):
                self.layers[number].reset()
            else:
                # Stock layers of some releases keep the shape of what they held.
                self.layers[number] = fresh
        self._plan.forget()
        self._guard.forget()
        self._ledger.forget()
        self._captured.forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> ElasticCache:
        import copy

        plan, guard, ledger = self._plan.copy(), self._guard.copy(), self._ledger.copy()
        layers = [
            layer.copy(plan, guard, ledger) if isinstance(layer, ElasticLayer) else copy.deepcopy(layer, memo)
            for layer in self.layers
        ]
        return type(self)(layers, plan, guard, ledger, self._captured.copy(guard))

    def captured_decode(self, model: Any, forward: Callable[..., Any], inputs: dict[str, Any], takes_positions: bool) -> Any:
        """Return what a model's `forward` makes of `inputs`, replaying a captured graph where that can be."""
        return self._captured(self, model, forward, inputs, takes_positions)

    @property
    def backends(self) -> Backends:
        """Where the layers are stored."""
        return self._plan.backends

    @property
    def has_room(self) -> bool:
        """Whether one more token is to come, as far as the running `generate` is known, and fits what is allocated."""
        layers, expected = self.elastic_layers, self._plan.expected
        ends = expected is not None and layers[0].slots.length >= expected
        return not ends and all(layer.store is not None and layer.store.room for layer in layers)

    def begin_step(self, layers: list[ElasticLayer]) -> None:
        """Make layers ready for one more token a row, and settle what it reads.

        Raises
        ------
        UsageError : if there is no room for it, or the pass before broke off.
        """
        self._guard.check_answered()
        self._guard.check_whole(layers)
        layers[0].check_step()
        reading = self._plan.reading(int(layers[0].lengths.max()) + 1)
        for layer in layers:
            layer.begin_step(reading)

    def end_step(self, layers: list[ElasticLayer]) -> None:
        """Count what layers have stored.

        Raises
        ------
        NonFiniteError : at every 32nd, if a NaN or infinity was stored.
        """
        for layer in layers:
            layer.end_step()
        if layers and layers[0].check_is_due:
            for layer in layers:
                layer.raise_non_finite()

    def rollback(self) -> None:
        """Undo what layers have queued of a decode, and not counted."""
        for layer in self.elastic_layers:
            if layer.store is not None:
                layer.store.rollback_step()

    @property
    def allocated_bytes(self) -> int:
        """Memory that the elastic layers hold in this process, spare room and scratch included."""
        total = 0
        for layer in self.elastic_layers:
            if layer.store is not None:
                total += layer.store.cache.allocated_bytes
            if layer.held is not None:
                total += sum(tensor.nbytes for tensor in layer.held)
        return total

    def report(self) -> CacheReport:
        """Return what the cache holds and has read, and the ratio by context; print it to see a table.

        Raises
        ------
        NonFiniteError : if a NaN or infinity was ever stored.
        """
        for layer in self.elastic_layers:
            layer.raise_non_finite()
        limit, plan = self._plan.sizes.max_positions, self._plan
        budget = plan.budget or plan.budget_for(plan.context or plan.usual, "bf16")
        longest = self._longest
        stored, dense = held_bytes(budget, self.lengths) if plan.sizes.elastic else (0, 0)
        read, dense_read = self._ledger.bytes_read(budget)
        stock = [
            layer for layer in self.layers if not isinstance(layer, ElasticLayer) and getattr(layer, "keys", None) is not None
        ]
        return CacheReport(
            compress=plan.ratio,
            holds_from=budget.holds_from,
            recipes={layer: budget.recipe_at(layer, longest or budget.context) for layer in budget.recipes},
            calibrated=plan.calibration is not None,
            lengths=self.lengths,
            stored_bytes=stored,
            dense_bytes=dense,
            allocated_bytes=self.allocated_bytes,
            stock_bytes=sum(layer.keys.nbytes + layer.values.nbytes for layer in stock),
            decodes=self._ledger.steps,
            captured=self._captured.count,
            not_captured=self._captured.reason,
            ahead=self._captured.ahead.count,
            chunks=self._ledger.chunks,
            read_bytes=read,
            dense_read_bytes=dense_read,
            prompt_seconds=self._ledger.prompt_seconds,
            quantize_seconds=self._ledger.quantize_seconds,
            by_context=by_context(budget, longest, limit) if plan.sizes.elastic else (),
            ranks=self._guard.ranks.count,
        )

    def save(self, path: Path | str) -> None:
        """Write the cache to a safetensors file; `load` reads it.

        Raises
        ------
        UsageError : if it holds layers that cannot be saved, its model is split over ranks, or the file cannot be written.
        """
        from elastickv.transformers.serialization import save

        save(self, Path(path))

    @classmethod
    def load(cls, path: Path | str, model: Any, capture: bool = True) -> ElasticCache:
        """Return the cache that `save` wrote, for the model it was made for; `capture` as in `for_model`.

        Raises
        ------
        UsageError : if the file is no saved cache, is damaged, or of another model; if the model is split over ranks.
        """
        from elastickv.transformers.serialization import load

        return load(cls, Path(path), model, capture)

    def __repr__(self) -> str:
        plan = self._plan
        asked = f"compress={plan.ratio:g}" if plan.ratio is not None else "recipes"
        layers = f"{len(self.elastic_layers)} of {len(self.layers)} layers elastic"
        return f"ElasticCache({asked}, {layers}, tokens {list(self.lengths)})"
