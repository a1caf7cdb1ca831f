"""Decodes as captured graphs: a model's pass over one token a row is recorded once and replayed.

A graph contains addresses, so it reads its own input tensors, into which those of each call are copied. The host's bookkeeping
happens around the replay: room and shares before it, tokens and bytes after it, while the device works.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from transformers.utils import ModelOutput

from elastickv.errors import UsageError
from elastickv.transformers.cache_argument import CACHE_ARGUMENT, without_cache
from elastickv.transformers.cache_checks import CacheChecks
from elastickv.transformers.config import outside
from elastickv.transformers.cuda_graph.capturable import NotCapturable, check_mode, signature_of, structure_of
from elastickv.transformers.cuda_graph.decode_protocol import DecodeCache, DecodeLayer, Recording
from elastickv.transformers.cuda_graph.recorder import Recorder, recorder_for, why_not
from elastickv.transformers.cuda_graph.speculative_launch import Graph, SpeculativeLaunch

GRAPHS = 4  # of one cache: calls of several kinds may alternate
_FIRST = "it takes two decodes of a kind"


class NotCapturedWarning(UserWarning):
    """Decodes run operation by operation because the model cannot be captured."""


class _CacheMark:
    """Stands for the cache in a graph's outputs: a reference to the cache would keep it alive."""


class Captured:
    """The graphs of one cache.

    Attributes
    ----------
    count : decodes that were replayed.
    speculative : launches decodes before they are requested.
    wanted : whether the user wants decodes to be captured.
    reason : why none was replayed, or None.
    """

    def __init__(self, checks: CacheChecks, wanted: bool) -> None:
        self._checks, self.wanted = checks, wanted
        self.count = 0
        self._disabled_because = why_not(checks.model, wanted)
        self._recorder: Recorder | None = None
        self._warned = False
        self.speculative = SpeculativeLaunch()
        self.forget()

    def forget(self) -> None:
        """Free all graphs."""
        self.speculative.end()
        self._ready: tuple[int, int] | None = None
        self._keys: tuple[Hashable, ...] = ()
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self._rehearsed: Hashable = None
        self._structure: Hashable = None
        self._reason: str | None = None

    def copy(self, checks: CacheChecks) -> Captured:
        """Return the graphs of a copied cache: none yet, because graphs contain addresses."""
        other = object.__new__(Captured)
        other.__dict__.update(self.__dict__)
        other._checks, other._recorder, other.speculative = checks, None, SpeculativeLaunch()
        other.forget()
        return other

    @property
    def reason(self) -> str | None:
        """Why no decode was captured. None if any was."""
        return None if self.count else self._disabled_because or self._reason or _FIRST

    def __call__(
        self, cache: DecodeCache, model: Any, forward: Callable[..., Any], inputs: dict[str, Any], takes_positions: bool
    ) -> Any:
        """Return the outputs of a model's `forward` for `inputs`, through a graph if possible.

        Passes of several tokens, and calls that cannot be captured, run as usual. The first decode of a kind is a rehearsal,
        the second is recorded and replayed, and later ones are replayed.
        """
        if not _is_decode(inputs):
            self._structure = None
            self.speculative.begin()
            return forward(**inputs)
        layers = cache.elastic_layers
        if self._disabled_because or not layers or any(layer.store is None or layer.capped is None for layer in layers):
            return forward(**inputs)
        if self._checks.model is not model or not self._checks.attention_is_ours:
            return forward(**inputs)
        try:
            outputs = self._decode(cache, layers, model, forward, inputs, takes_positions)
        except NotCapturable as reason:
            self._warn(str(reason))
            outputs = None
        if outputs is not None:
            return outputs
        cache.backends.note_use()
        return forward(**inputs)

    def _decode(
        self,
        cache: DecodeCache,
        layers: Sequence[DecodeLayer],
        model: Any,
        forward: Callable[..., Any],
        inputs: dict[str, Any],
        takes_positions: bool,
    ) -> Any:
        """Return a decode's outputs. None if a row's token is padding or the layers have to check the mask themselves.

        Raises
        ------
        NotCapturable : with the reason, before anything has changed.
        """
        device = _tokens(inputs).device
        if self._structure is None:
            self._inspect(cache, layers, model, device)
        assert self._recorder is not None
        check_mode()
        fixed = _fixed(inputs, layers[0], takes_positions)
        if fixed is None:
            return None
        if self._ready != (cache.backends.uses, layers[0].padding.length):
            self._make_ready(cache, layers)
        key = (signature_of(fixed, device), self._structure, self._keys)

        def run(recording: Recording, **tensors: torch.Tensor) -> Any:
            with self._checks.records(recording):
                return _without(forward(**(fixed | tensors), **{CACHE_ARGUMENT: cache}), cache)

        graph = self._graphs.get(key)
        if graph is None:
            cache.backends.note_use()
            self._recorder.wait_for_others(host=True)
            if key != self._rehearsed:
                self._rehearsed = key
                return self._rehearse(cache, layers, run)
            graph = self._record(run, {n: v for n, v in fixed.items() if isinstance(v, torch.Tensor)})
            self._graphs[key] = graph
            if len(self._graphs) > GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        try:
            static_outputs = self.speculative.matched(cache, graph, fixed)
            if static_outputs is None:
                self.speculative.compare(fixed)
                self._recorder.wait_for_others()
                for name, tensor in graph.inputs.items():
                    tensor.copy_(fixed[name], non_blocking=True)
                static_outputs = graph.replay()
            outputs = _fresh(static_outputs, cache)
            self.count += 1
            cache.end_step(layers)
        except BaseException:
            self.speculative.abandon(cache)
            raise
        follows = cache.has_room and self._follows(cache, layers, key)
        # Ranks do not launch speculatively: a cache that is used on one rank only would roll back there and not on the others.
        if follows and self._recorder.launches_speculatively and self._checks.ranks.count == 1:
            self.speculative.predict(graph, outputs)
            self.speculative.launch(cache, graph, static_outputs, self._recorder)
        return outputs

    def _make_ready(self, cache: DecodeCache, layers: Sequence[DecodeLayer]) -> None:
        """Prepare layers for one more token, and note the state for which they are ready."""
        cache.begin_step()
        self._keys = tuple(layer.launch_key for layer in layers)
        self._ready = (cache.backends.uses, layers[0].padding.length)

    def _follows(self, cache: DecodeCache, layers: Sequence[DecodeLayer], key: tuple[Hashable, ...]) -> bool:
        """Prepare layers while the device works; return whether one more decode would replay the same graph."""
        try:
            self._make_ready(cache, layers)
        except UsageError:
            return False  # the call that requests this decode raises the error
        return self._keys == key[-1]

    def _inspect(self, cache: DecodeCache, layers: Sequence[DecodeLayer], model: Any, device: torch.device) -> None:
        """Check what does not change within a text.

        Raises
        ------
        NotCapturable : if the model cannot be captured.
        """
        if len(layers) < len(cache.layers):
            self._disable("layers with a window or linear attention keep Transformers' cache")
        if any(layer.capped for layer in layers):
            self._disable("its attention caps scores")
        reason = None
        try:
            structure = structure_of(model, device)
        except NotCapturable as error:
            reason = str(error)
        if reason := self._agreed(reason):
            raise NotCapturable(reason)
        self._structure = structure
        self._recorder = self._recorder or recorder_for(device)
        if self._recorder is None:
            self._disable(f"the model is on the {device.type}")

    def _rehearse(self, cache: DecodeCache, layers: Sequence[DecodeLayer], run: Callable[..., Any]) -> Any:
        """Run a decode the way it would be recorded."""
        assert self._recorder is not None
        recording = Recording()
        try:
            outputs, waits = self._recorder.rehearse(partial(run, recording))
        except BaseException:
            # As for any pass that stops halfway: stored tokens are counted, and the next pass is refused.
            for layer in recording.queued:
                layer.end_step()
            raise
        cache.begin_step()  # returns to the present stream from the recorder's
        cache.end_step(recording.queued)
        fresh = _fresh(outputs, cache)
        reason = None
        if waits is not None:
            reason = f"it waits for the device ({waits})"
        elif recording.length_read:
            reason = "it computes with the number of tokens on the host"
        elif len(recording.queued) != len(layers):
            reason = "it leaves layers out"
        if reason := self._agreed(reason):
            self._drop(reason)
            self._warn(reason)
        return fresh

    def _record(self, run: Callable[..., Any], tensors: dict[str, torch.Tensor]) -> Graph:
        """Record a decode that reads copies of `tensors`. Nothing is stored or counted yet."""
        assert self._recorder is not None
        with torch.inference_mode(False):
            # Tensors made in inference mode cannot be written outside of it.
            copies = {name: torch.empty(v.shape, dtype=v.dtype, device=v.device) for name, v in tensors.items()}
        for name, copy in copies.items():
            copy.copy_(tensors[name])
        reason = None
        try:
            replay = self._recorder.record(partial(run, Recording(), **copies))
        except Exception as error:
            reason = f"the capture failed: {_first_line(error)}"
        if reason := self._agreed(reason):
            self._disable(reason)
        return Graph(copies, replay)

    def _agreed(self, reason: str | None) -> str | None:
        """Return why decodes are not captured, here or on another rank: communication is captured by all ranks or by none."""
        all_can = self._checks.ranks.agree(reason is None)
        return None if all_can else reason or "another rank of the model cannot capture them"

    def _drop(self, reason: str) -> None:
        self._disabled_because = reason
        self._graphs.clear()

    def _disable(self, reason: str) -> None:
        self._drop(reason)
        raise NotCapturable(reason)

    def _warn(self, reason: str) -> None:
        """Note why decodes are not captured; warn once per cache."""
        self._reason = reason
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"decodes of {self._checks.model_name} are not captured as CUDA graphs and run operation by operation: "
                f"{reason}",
                NotCapturedWarning,
                stacklevel=outside("torch", "transformers"),
            )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__


def _tokens(inputs: dict[str, Any]) -> Any:
    ids = inputs.get("input_ids")
    return inputs.get("inputs_embeds") if ids is None else ids


def _is_decode(inputs: dict[str, Any]) -> bool:
    tokens = _tokens(inputs)
    return isinstance(tokens, torch.Tensor) and tokens.dim() >= 2 and tokens.shape[1] == 1


def _fixed(inputs: dict[str, Any], layer: DecodeLayer, takes_positions: bool) -> dict[str, Any] | None:
    """Return the arguments with positions filled in and without a redundant mask. None if the mask is not redundant.

    Raises
    ------
    NotCapturable : if the mask's shape grows with the text.
    """
    fixed = without_cache(inputs)
    mask, length = inputs.get("attention_mask"), layer.padding.length
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            raise NotCapturable("its attention_mask is not of two dimensions")
        # The layers know the padding of stored tokens, and refuse a mask that contradicts it.
        if mask.shape[1] != length + 1 or not bool(mask[:, -1].all() & layer.padding.agrees(mask)):
            return None
        fixed["attention_mask"] = None
    if inputs.get("position_ids") is None and takes_positions:
        if mask is not None:
            raise NotCapturable("an attention_mask comes without position_ids, and the model may count by it")
        tokens = _tokens(inputs)
        fixed["position_ids"] = torch.full((1, 1), length, dtype=torch.int64, device=tokens.device)
    return fixed


def _without(value: Any, cache: DecodeCache) -> Any:
    """Return a pass's outputs with a placeholder for the cache."""
    return _mapped(value, lambda item: _CacheMark if item is cache else item)


def _fresh(value: Any, cache: DecodeCache) -> Any:
    """Return copies of a graph's outputs with the cache put back; the next replay overwrites the originals."""

    def fresh(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return item.clone()
        return cache if item is _CacheMark else item

    return _mapped(value, fresh)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, ModelOutput):
        return type(value)(**{name: _mapped(item, change) for name, item in value.items()})
    if isinstance(value, dict):
        return {name: _mapped(item, change) for name, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, change) for item in value)
    return change(value)
