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
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from elastickv.transformers.cache import ElasticCache
    from elastickv.transformers.cuda_graph.recorder import Recorder

_READ = {"input_ids", "position_ids"}  # what a pass must read, and nothing else, to be launched ahead


@dataclass(frozen=True)
class Graph:
    """A recorded pass and the tensors that it reads, by name; `replay` returns the same tensors each time."""

    inputs: dict[str, torch.Tensor]
    replay: Callable[[], Any]


@dataclass
class _Flight:
    """A decode under way; `outputs` is None until all of it is queued.

    Attributes
    ----------
    told, done : events of when what it reads is written, and of its end.
    """

    cache: weakref.ref[ElasticCache]
    graph: Graph
    recorder: Recorder
    told: torch.cuda.Event
    done: torch.cuda.Event
    outputs: Any = None

    def rollback(self) -> None:
        """Let what is queued from here on find the stores as they were before."""
        self.recorder.follow(self.done)
        cache = self.cache()
        if cache is not None:
            cache.rollback()

    def wait(self) -> None:
        """Wait until it has run."""
        self.done.synchronize()


class SpeculativeLaunch:
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
            if cache is not None and cache.backends.in_flight is flight:
                cache.backends.in_flight = None
        self.begin()

    def matched(self, cache: ElasticCache, graph: Graph, inputs: dict[str, Any]) -> Any:
        """Return the outputs of a pass with these inputs, if that is what is under way; else None, and it is taken back."""
        flight, backends = self._flight, cache.backends
        if flight is not None and backends.in_flight is flight and flight.graph is graph and flight.outputs is not None:
            flight.recorder.follow(flight.told)
            if _same(graph.inputs, inputs):
                self._flight = backends.in_flight = None
                flight.recorder.follow(flight.done)
                self.count += 1
                return flight.outputs
        if backends.in_flight is not None:
            backends.note_use()
        # Of a text that began since, nothing is known yet.
        if flight is not None and self._sure:
            self._sure = False
        self._flight = None
        return None

    def abandon(self, cache: ElasticCache) -> None:
        """Take back a decode that something broke off: what was queued of it has not been counted."""
        if cache.backends.in_flight is not None:
            cache.backends.note_use()
        else:
            cache.rollback()
        self._flight = None

    def compare(self, inputs: dict[str, Any]) -> None:
        """Note whether the likeliest token came."""
        if self._guess is not None:
            self._sure, self._guess = bool(torch.equal(self._guess, inputs["input_ids"])), None

    def predict(self, graph: Graph, outputs: Any) -> None:
        """Keep the likeliest token of a pass in mind, to see whether it comes."""
        if self._sure is None and set(graph.inputs) == _READ and _tells(graph, outputs):
            self._guess = _likeliest(outputs)

    def launch(self, cache: ElasticCache, graph: Graph, outputs: Any, recorder: Recorder) -> None:
        """Launch what would come next, if it is foreseen; the stores have room for it."""
        if not self._sure:
            return

        def tell() -> None:
            _likeliest(outputs, graph.inputs["input_ids"])
            graph.inputs["position_ids"].add_(1)

        def replay() -> None:
            flight.outputs = graph.replay()

        flight = _Flight(weakref.ref(cache), graph, recorder, recorder.end(), recorder.end())
        self._flight = cache.backends.in_flight = flight
        recorder.beside((tell, replay), (flight.told, flight.done))


def _tells(graph: Graph, outputs: Any) -> bool:
    """Return whether the next pass's token can be made of a pass's outputs."""
    logits = getattr(outputs, "logits", None)
    one = isinstance(logits, torch.Tensor) and logits.dim() == 3 and logits.shape[1] == 1
    return one and graph.inputs["input_ids"].dtype == torch.int64


def _likeliest(outputs: Any, to: torch.Tensor | None = None) -> torch.Tensor:
    return torch.argmax(outputs.logits, dim=-1, out=to)


def _same(known: dict[str, torch.Tensor], given: dict[str, Any]) -> bool:
    """Return whether tensors agree; the host waits for the device once."""
    return bool(torch.stack([(tensor == given[name]).all() for name, tensor in known.items()]).all())
