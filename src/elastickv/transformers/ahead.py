"""The next decode, launched before it is asked for.

Between two decodes the host chooses a token, and the device waits for it. Where the likeliest token has turned out to be the
one that comes, the next decode is launched with it right behind the present one, on a stream of its own. The call that asks for
this decode finds it under way; a call that asks for anything else takes it back first. A decode that is taken back leaves no
trace: all that it wrote is written again, or lies beyond the lengths that are restored.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from elastickv.transformers.cache import ElasticCache
    from elastickv.transformers.device_store import DeviceStore
    from elastickv.transformers.recorder import Recorder

_READ = {"input_ids", "position_ids"}  # what a pass must read, and nothing else, to be launched ahead


@dataclass(frozen=True)
class Graph:
    """A recorded pass and the tensors that it reads, by name; `replay` returns the same tensors each time."""

    inputs: dict[str, torch.Tensor]
    replay: Callable[[], Any]


@dataclass(frozen=True)
class _Flight:
    """A decode under way."""

    cache: weakref.ref[ElasticCache]
    graph: Graph
    outputs: Any
    done: torch.cuda.Event

    def take_back(self) -> None:
        """Let what is queued from here on find the stores as they were before."""
        self.done.wait()
        cache = self.cache()
        for layer in () if cache is None else cache.elastic_layers:
            cast("DeviceStore", layer.store).take_back()

    def wait(self) -> None:
        """Wait until it has run."""
        self.done.synchronize()


class LookAhead:
    """Launches decodes of one cache ahead, for as long as what comes is what was foreseen.

    Attributes
    ----------
    count : decodes that had been launched when they were asked for.
    """

    def __init__(self) -> None:
        self.count = 0
        self._flight: _Flight | None = None
        self.begin()

    def begin(self) -> None:
        """Begin a text: it has to show anew whether it takes the likeliest tokens."""
        self._sure: bool | None = None
        self._guess: torch.Tensor | None = None

    def end(self) -> None:
        """Wait for what is under way, and forget it."""
        flight, self._flight = self._flight, None
        if flight is not None:
            flight.wait()
            cache = flight.cache()
            if cache is not None and cache.backends.ahead is flight:
                cache.backends.ahead = None
        self.begin()

    def landed(self, cache: ElasticCache, graph: Graph, inputs: dict[str, Any]) -> Any:
        """Return the outputs of a pass with these inputs, if that is what is under way; else None, and it is taken back."""
        flight, self._flight = self._flight, None
        if flight is None:
            return None
        backends = cache.backends
        if backends.ahead is flight and flight.graph is graph and _same(graph.inputs, inputs):
            backends.ahead = None
            flight.done.wait()
            self.count += 1
            return flight.outputs
        if backends.ahead is flight:
            backends.note_use()
        self._sure = False
        return None

    def compare(self, inputs: dict[str, Any]) -> None:
        """Note whether the likeliest token came."""
        if self._guess is not None:
            self._sure, self._guess = bool(torch.equal(self._guess, inputs["input_ids"])), None

    def foresee(self, graph: Graph, outputs: Any) -> None:
        """Keep the likeliest token of a pass in mind, to see whether it comes."""
        if self._sure is None and set(graph.inputs) == _READ and _has_logits(outputs):
            self._guess = _likeliest(outputs)

    def launch(self, cache: ElasticCache, graph: Graph, outputs: Any, recorder: Recorder) -> None:
        """Launch what would come next, if it is foreseen; the stores have room for it."""
        if not self._sure:
            return

        def run() -> Any:
            _likeliest(outputs, graph.inputs["input_ids"])
            graph.inputs["position_ids"].add_(1)
            return graph.replay()

        outputs, done = recorder.beside(run)
        self._flight = _Flight(weakref.ref(cache), graph, outputs, done)
        cache.backends.ahead = self._flight


def _has_logits(outputs: Any) -> bool:
    logits = getattr(outputs, "logits", None)
    return isinstance(logits, torch.Tensor) and logits.dim() == 3 and logits.shape[1] == 1


def _likeliest(outputs: Any, to: torch.Tensor | None = None) -> torch.Tensor:
    return torch.argmax(outputs.logits, dim=-1, out=to)


def _same(known: dict[str, torch.Tensor], given: dict[str, Any]) -> bool:
    """Return whether tensors agree; the host waits for the device once."""
    return bool(torch.stack([(tensor == given[name]).all() for name, tensor in known.items()]).all())
