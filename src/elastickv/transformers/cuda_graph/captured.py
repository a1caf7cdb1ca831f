"""Decodes as captured graphs: a model's pass over one token a row is recorded once and replayed.

A graph has addresses in it, so what a pass reads lies in tensors of its own, into which a call's are copied. What the host
counts is counted around the replay: room and shares before, tokens and bytes after, while the device is at work.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import ModelOutput

from elastickv.errors import UsageError
from elastickv.transformers.cache_argument import CACHE_ARGUMENT, without_cache
from elastickv.transformers.checks import CacheChecks, Recording
from elastickv.transformers.config import outside
from elastickv.transformers.cuda_graph.capturable import NotCapturable, check_mode, signature_of, structure_of
from elastickv.transformers.cuda_graph.recorder import Recorder, recorder_for, why_not
from elastickv.transformers.cuda_graph.speculative_launch import Graph, SpeculativeLaunch

if TYPE_CHECKING:
    from elastickv.transformers.cache import ElasticCache
    from elastickv.transformers.layer import ElasticLayer

GRAPHS = 4  # of one cache: calls may take turns
_FIRST = "it takes two decodes of a kind"


class NotCapturedWarning(UserWarning):
    """Decodes run operation by operation, because the model cannot be captured."""


class _Here:
    """Where a pass's outputs hold the cache: a graph that held it too would keep it alive."""


class Captured:
    """The graphs of one cache.

    Attributes
    ----------
    count : decodes that were replayed.
    ahead : launches decodes before they are asked for.
    reason : why none is replayed, or None.
    """

    def __init__(self, guard: CacheChecks, wanted: bool) -> None:
        self._guard, self.wanted = guard, wanted
        self.count = 0
        self._given_up = why_not(guard.model, wanted)
        self._recorder: Recorder | None = None
        self._warned = False
        self.ahead = SpeculativeLaunch()
        self.forget()

    def forget(self) -> None:
        """Free all graphs."""
        self.ahead.end()
        self._ready: tuple[int, int] | None = None
        self._keys: tuple[Hashable, ...] = ()
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self._rehearsed: Hashable = None
        self._structure: Hashable = None
        self._reason: str | None = None

    def copy(self, guard: CacheChecks) -> Captured:
        """Return the same for a copy of the cache, which needs graphs of its own."""
        other = object.__new__(Captured)
        other.__dict__.update(self.__dict__)
        other._guard, other._recorder, other.ahead = guard, None, SpeculativeLaunch()
        other.forget()
        return other

    @property
    def reason(self) -> str | None:
        """Why no decode was captured; None if any was."""
        return None if self.count else self._given_up or self._reason or _FIRST

    def __call__(
        self, cache: ElasticCache, model: Any, forward: Callable[..., Any], inputs: dict[str, Any], takes_positions: bool
    ) -> Any:
        """Return what a model's `forward` makes of `inputs`, through a graph where that can be.

        A pass of several tokens and calls that cannot be captured run as they are. The first decode of a kind is a rehearsal,
        the second is recorded and replayed, as are those after it.
        """
        if not _is_decode(inputs):
            self._structure = None
            self.ahead.begin()
            return forward(**inputs)
        layers = cache.elastic_layers
        if self._given_up or not layers or any(layer.store is None or layer.capped is None for layer in layers):
            return forward(**inputs)
        if self._guard.model is not model or not self._guard.attention_is_ours:
            return forward(**inputs)
        try:
            found = self._decode(cache, layers, model, forward, inputs, takes_positions)
        except NotCapturable as reason:
            self._say(str(reason))
            found = None
        if found is not None:
            return found
        cache.backends.note_use()
        return forward(**inputs)

    def _decode(
        self,
        cache: ElasticCache,
        layers: list[ElasticLayer],
        model: Any,
        forward: Callable[..., Any],
        inputs: dict[str, Any],
        takes_positions: bool,
    ) -> Any:
        """Return a decode's outputs; None if a row's token is padding, or the layers have to say something about it.

        Raises
        ------
        NotCapturable : telling why, before anything has changed.
        """
        device = _tokens(inputs).device
        if self._structure is None:
            self._look(cache, layers, model, device)
        assert self._recorder is not None
        check_mode()
        fixed = _fixed(inputs, layers[0], takes_positions)
        if fixed is None:
            return None
        if self._ready != (cache.backends.uses, layers[0].slots.length):
            self._make_ready(cache, layers)
        key = (signature_of(fixed, device), self._structure, self._keys)

        def run(recording: Recording, **tensors: torch.Tensor) -> Any:
            with self._guard.records(recording):
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
            kept = self.ahead.matched(cache, graph, fixed)
            if kept is None:
                self.ahead.compare(fixed)
                self._recorder.wait_for_others()
                for name, tensor in graph.inputs.items():
                    tensor.copy_(fixed[name], non_blocking=True)
                kept = graph.replay()
            outputs = _fresh(kept, cache)
            self.count += 1
            cache.end_step(layers)
        except BaseException:
            self.ahead.abandon(cache)
            raise
        follows = cache.has_room and self._follows(cache, layers, key)
        # Ranks do not look ahead: a cache that one of them alone uses would take its pass back, and not the others'.
        if follows and self._recorder.launches_speculatively and self._guard.ranks.count == 1:
            self.ahead.predict(graph, outputs)
            self.ahead.launch(cache, graph, kept, self._recorder)
        return outputs

    def _make_ready(self, cache: ElasticCache, layers: list[ElasticLayer]) -> None:
        """Make layers ready for a token, and note what it will find."""
        cache.begin_step(layers)
        self._keys = tuple(layer.launch_key for layer in layers)
        self._ready = (cache.backends.uses, layers[0].slots.length)

    def _follows(self, cache: ElasticCache, layers: list[ElasticLayer], key: tuple[Hashable, ...]) -> bool:
        """Make layers ready while the device is at work; return whether one more decode is a replay of the same graph."""
        try:
            self._make_ready(cache, layers)
        except UsageError:
            return False  # who asks for it will be told
        return self._keys == key[-1]

    def _look(self, cache: ElasticCache, layers: list[ElasticLayer], model: Any, device: torch.device) -> None:
        """Look at what does not change within a text."""
        if len(layers) < len(cache.layers):
            self._give_up("layers with a window or linear attention keep Transformers' cache")
        if any(layer.capped for layer in layers):
            self._give_up("its attention caps scores")
        reason = None
        try:
            structure = structure_of(model, device)
        except NotCapturable as found:
            reason = str(found)
        if reason := self._agreed(reason):
            raise NotCapturable(reason)
        self._structure = structure
        self._recorder = self._recorder or recorder_for(device)
        if self._recorder is None:
            self._give_up(f"the model is on the {device.type}")

    def _rehearse(self, cache: ElasticCache, layers: list[ElasticLayer], run: Callable[..., Any]) -> Any:
        """Take a decode as it would be recorded."""
        assert self._recorder is not None
        recording = Recording()
        try:
            outputs, waits = self._recorder.rehearse(partial(run, recording))
        except BaseException:
            # As when any pass breaks off: what the layers have stored is counted, and the next pass is refused.
            for layer in recording.queued:
                layer.end_step()
            raise
        cache.begin_step(layers)  # back from the recorder's stream
        cache.end_step(recording.queued)
        found = _fresh(outputs, cache)
        reason = None
        if waits is not None:
            reason = f"it waits for the device ({waits})"
        elif recording.length_read:
            reason = "it computes with the number of tokens on the host"
        elif len(recording.queued) != len(layers):
            reason = "it leaves layers out"
        if reason := self._agreed(reason):
            self._drop(reason)
            self._say(reason)
        return found

    def _record(self, run: Callable[..., Any], tensors: dict[str, torch.Tensor]) -> Graph:
        """Record a decode that reads copies of `tensors`; nothing is stored or counted yet."""
        assert self._recorder is not None
        with torch.inference_mode(False):
            # Tensors of an inference mode could not be written outside of it.
            copies = {name: torch.empty(v.shape, dtype=v.dtype, device=v.device) for name, v in tensors.items()}
        for name, copy in copies.items():
            copy.copy_(tensors[name])
        reason = None
        try:
            replay = self._recorder.record(partial(run, Recording(), **copies))
        except Exception as error:
            reason = f"the capture failed: {_first_line(error)}"
        if reason := self._agreed(reason):
            self._give_up(reason)
        return Graph(copies, replay)

    def _agreed(self, reason: str | None) -> str | None:
        """Return why decodes are not captured, here or on another rank: what talks is captured by all ranks, or by none."""
        alike = self._guard.ranks.agree(reason is None)
        return None if alike else reason or "another rank of the model cannot capture them"

    def _drop(self, reason: str) -> None:
        self._given_up = reason
        self._graphs.clear()

    def _give_up(self, reason: str) -> None:
        self._drop(reason)
        raise NotCapturable(reason)

    def _say(self, reason: str) -> None:
        """Warn, once a cache, that decodes are not captured."""
        self._reason = reason
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"decodes of {self._guard.model_name} are not captured as CUDA graphs and run operation by operation: {reason}",
                NotCapturedWarning,
                stacklevel=outside("torch", "transformers"),
            )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__


def _tokens(inputs: dict[str, Any]) -> Any:
    given = inputs.get("input_ids")
    return inputs.get("inputs_embeds") if given is None else given


def _is_decode(inputs: dict[str, Any]) -> bool:
    tokens = _tokens(inputs)
    return isinstance(tokens, torch.Tensor) and tokens.dim() >= 2 and tokens.shape[1] == 1


def _fixed(inputs: dict[str, Any], layer: ElasticLayer, takes_positions: bool) -> dict[str, Any] | None:
    """Return the arguments with a mask that has nothing to say left out and positions put in; None if the mask says more.

    Raises
    ------
    NotCapturable : if the mask is of a kind that grows with the text.
    """
    fixed = without_cache(inputs)
    mask, places = inputs.get("attention_mask"), layer.slots.length
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            raise NotCapturable("its attention_mask is not of two dimensions")
        # What is padded among the stored tokens, the layers know, and refuse a mask that says otherwise.
        if mask.shape[1] != places + 1 or not bool(mask[:, -1].all() & layer.slots.agrees(mask)):
            return None
        fixed["attention_mask"] = None
    if inputs.get("position_ids") is None and takes_positions:
        if mask is not None:
            raise NotCapturable("an attention_mask comes without position_ids, and the model may count by it")
        tokens = _tokens(inputs)
        fixed["position_ids"] = torch.full((1, 1), places, dtype=torch.int64, device=tokens.device)
    return fixed


def _without(value: Any, cache: ElasticCache) -> Any:
    """Return a pass's outputs without the cache."""
    return _mapped(value, lambda item: _Here if item is cache else item)


def _fresh(value: Any, cache: ElasticCache) -> Any:
    """Return outputs that the next replay leaves alone, with the cache."""
    return _mapped(value, lambda item: item.clone() if isinstance(item, torch.Tensor) else cache if item is _Here else item)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, ModelOutput):
        return type(value)(**{name: _mapped(item, change) for name, item in value.items()})
    if isinstance(value, dict):
        return {name: _mapped(item, change) for name, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, change) for item in value)
    return change(value)
