"""Launch the next decode before it is requested.

Between two decodes the host chooses a token while the device waits. If the likeliest token turned out to be the chosen one, the
next decode is launched with the likeliest token right behind the present one, on its own stream. A call that requests this
decode then finds it in flight; any other call rolls it back first. A rollback leaves no trace: everything that the decode wrote
is written again or lies beyond the restored lengths.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from elastickv.transformers.cuda_graph.decode_protocol import DecodeCache
from elastickv.transformers.cuda_graph.recorder import Recorder

_READ = {"input_ids", "position_ids"}  # the only inputs of a pass that can be launched speculatively


@dataclass(frozen=True)
class Graph:
    """A recorded pass and its input tensors by name. `replay` returns the same output tensors each time."""

    inputs: dict[str, torch.Tensor]
    replay: Callable[[], Any]


@dataclass
class _Flight:
    """A decode in flight.

    Attributes
    ----------
    inputs_ready, done : events at which its inputs are written, and at which it ends.
    outputs : None until all of it is queued.
    """

    cache: weakref.ref[DecodeCache]
    graph: Graph
    recorder: Recorder
    inputs_ready: torch.cuda.Event
    done: torch.cuda.Event
    outputs: Any = None

    def rollback(self) -> None:
        """Restore the stores for work that is queued from here on."""
        self.recorder.wait_for(self.done)
        cache = self.cache()
        if cache is not None:
            cache.rollback()

    def wait(self) -> None:
        """Wait until the decode has run."""
        self.done.synchronize()


class SpeculativeLaunch:
    """Launches decodes of one cache speculatively, for as long as the predicted tokens are chosen.

    Attributes
    ----------
    count : decodes that were in flight when they were requested.
    """

    def __init__(self) -> None:
        self.count = 0
        self._flight: _Flight | None = None
        self.begin()

    def begin(self) -> None:
        """Begin a text, of which it is not known yet whether it takes the likeliest tokens."""
        self._confirmed: bool | None = None
        self._predicted: torch.Tensor | None = None

    def end(self) -> None:
        """Wait for the decode in flight, and forget it."""
        flight, self._flight = self._flight, None
        if flight is not None:
            flight.wait()
            cache = flight.cache()
            if cache is not None and cache.backends.in_flight is flight:
                cache.backends.in_flight = None
        self.begin()

    def matched(self, cache: DecodeCache, graph: Graph, inputs: dict[str, Any]) -> Any:
        """Return the outputs of the decode in flight if it has these inputs; else roll it back and return None."""
        flight, backends = self._flight, cache.backends
        if flight is not None and backends.in_flight is flight and flight.graph is graph and flight.outputs is not None:
            flight.recorder.wait_for(flight.inputs_ready)
            if _same(graph.inputs, inputs):
                self._flight = backends.in_flight = None
                flight.recorder.wait_for(flight.done)
                self.count += 1
                return flight.outputs
        if backends.in_flight is not None:
            backends.note_use()
        # Not if another text has begun since: nothing is known about that one.
        if flight is not None and self._confirmed:
            self._confirmed = False
        self._flight = None
        return None

    def abandon(self, cache: DecodeCache) -> None:
        """Roll back a decode that an error interrupted: its queued part has not been counted."""
        if cache.backends.in_flight is not None:
            cache.backends.note_use()
        else:
            cache.rollback()
        self._flight = None

    def compare(self, inputs: dict[str, Any]) -> None:
        """Note whether the predicted token was chosen."""
        if self._predicted is not None:
            self._confirmed, self._predicted = bool(torch.equal(self._predicted, inputs["input_ids"])), None

    def predict(self, graph: Graph, outputs: Any) -> None:
        """Predict the next token as the likeliest, for `compare`."""
        if self._confirmed is None and set(graph.inputs) == _READ and _has_next_token(graph, outputs):
            self._predicted = _likeliest(outputs)

    def launch(self, cache: DecodeCache, graph: Graph, outputs: Any, recorder: Recorder) -> None:
        """Launch the next decode if predictions were confirmed. The stores must have room for it."""
        if not self._confirmed:
            return

        def write_inputs() -> None:
            _likeliest(outputs, graph.inputs["input_ids"])
            graph.inputs["position_ids"].add_(1)

        def replay() -> None:
            flight.outputs = graph.replay()

        flight = _Flight(weakref.ref(cache), graph, recorder, recorder.new_event(), recorder.new_event())
        self._flight = cache.backends.in_flight = flight
        recorder.launch_concurrently((write_inputs, replay), (flight.inputs_ready, flight.done))


def _has_next_token(graph: Graph, outputs: Any) -> bool:
    """Return whether the next pass's tokens follow from a pass's outputs."""
    logits = getattr(outputs, "logits", None)
    one = isinstance(logits, torch.Tensor) and logits.dim() == 3 and logits.shape[1] == 1
    return one and graph.inputs["input_ids"].dtype == torch.int64


def _likeliest(outputs: Any, out: torch.Tensor | None = None) -> torch.Tensor:
    return torch.argmax(outputs.logits, dim=-1, out=out)


def _same(used: dict[str, torch.Tensor], requested: dict[str, Any]) -> bool:
    """Return whether tensors are equal. The host waits for the device once."""
    return bool(torch.stack([(tensor == requested[name]).all() for name, tensor in used.items()]).all())
