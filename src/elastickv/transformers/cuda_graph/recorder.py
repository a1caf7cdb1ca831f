"""A pass through a model as one CUDA graph: tried out, captured, replayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, Protocol

import torch

from elastickv.backends.cuda.programs import collecting_nothing
from elastickv.transformers.cuda_graph.in_flight import note_in_flight, wait_for_others

_WAITS = "called a synchronizing CUDA operation"
_PROTOTYPE = "Synchronization debug mode"

Pass = Callable[[], Any]


class Recorder(Protocol):
    """Makes replays of a pass whose inputs stay where they are.

    Attributes
    ----------
    looks_ahead : whether `beside` is of use: the host does not wait for a replay.
    """

    launches_speculatively: bool

    def rehearse(self, run: Pass) -> tuple[Any, str | None]:
        """Run a pass as it would be recorded; return what it returns, and where the host waits for the device, or None."""

    def record(self, run: Pass) -> Pass:
        """Record a pass without doing its work; what is returned does it, and returns the same tensors each time."""

    def end(self) -> torch.cuda.Event:
        """Return an event, for `beside` to record."""

    def beside(self, steps: Sequence[Pass], ends: Sequence[torch.cuda.Event]) -> None:
        """Queue `steps` behind what the caller has queued, not before what follows, and behind each of them its end."""

    def follow(self, end: torch.cuda.Event) -> None:
        """Let what follows wait for an end."""

    def wait_for_others(self, host: bool = False) -> None:
        """Let what follows, or the host, wait for what was queued by `beside`, for whichever cache."""


def recorder_for(device: torch.device) -> Recorder | None:
    """Return what records on a device, or None where nothing does."""
    return GraphRecorder(device) if device.type == "cuda" else None


def why_not(model: Any, wanted: bool) -> str | None:
    """Return why a model's passes are not even tried to be recorded, or None."""
    device = next(model.parameters()).device
    if not wanted:
        return "capture=False"
    return f"the model is on the {device.type}" if recorder_for(device) is None else None


@cache
def _capture_stream(index: int) -> Any:
    """Return the stream that passes are recorded on: one a device, because libraries keep a workspace for each."""
    return torch.cuda.Stream(index)


class GraphRecorder:
    """Records CUDA graphs, which share one pool of memory: their replays follow each other."""

    launches_speculatively = True

    def __init__(self, device: torch.device) -> None:
        self._index = torch.cuda.current_device() if device.index is None else device.index
        self._pool = torch.cuda.graph_pool_handle()

    def rehearse(self, run: Pass) -> tuple[Any, str | None]:
        """Run a pass on the stream of captures, so that what is loaded or allocated once is, outside of a graph."""
        before = torch.cuda.get_sync_debug_mode()
        with self._on_device(), warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            present, stream = torch.cuda.current_stream(), _capture_stream(self._index)
            stream.wait_stream(present)
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with torch.cuda.stream(stream):
                    outputs = run()
            finally:
                torch.cuda.set_sync_debug_mode(before)
                present.wait_stream(stream)
        waits = None
        for warning in heard:
            text = str(warning.message)
            if text.startswith(_WAITS):
                waits = waits or f"{warning.filename}:{warning.lineno}"
            elif not text.startswith(_PROTOTYPE):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return outputs, waits

    def record(self, run: Pass) -> Pass:
        """Capture a graph."""
        graph = torch.cuda.CUDAGraph()
        with self._on_device(), collecting_nothing():
            present, stream = torch.cuda.current_stream(), _capture_stream(self._index)
            first: BaseException | None = None
            try:
                # Other threads, such as a communication library's, may go on meanwhile.
                with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                    try:
                        outputs = run()
                    except BaseException as error:
                        first = error
                        raise
            except BaseException as error:
                torch.cuda.set_stream(present)
                self._recover()
                # Ending a capture that is broken raises again, and says less.
                cause = first or error
                try:
                    raise cause from None
                finally:
                    # An exception holds this frame, and the frame would hold it, and with it the cache.
                    del cause, first

        def replay() -> Any:
            graph.replay()
            return outputs

        return replay

    def end(self) -> torch.cuda.Event:
        """Return an event."""
        return torch.cuda.Event()

    def beside(self, steps: Sequence[Pass], ends: Sequence[torch.cuda.Event]) -> None:
        """Queue `steps` on the stream of captures."""
        with self._on_device():
            present, stream = torch.cuda.current_stream(), _capture_stream(self._index)
            stream.wait_stream(present)
            try:
                with torch.cuda.stream(stream):
                    for step, end in zip(steps, ends, strict=True):
                        step()
                        end.record()
            finally:
                # However far it came.
                ends[-1].record(stream)
                note_in_flight(torch.device("cuda", self._index), ends[-1])

    def follow(self, end: torch.cuda.Event) -> None:
        """Let the present stream wait."""
        end.wait(torch.cuda.current_stream(self._index))

    def wait_for_others(self, host: bool = False) -> None:
        """Let what follows on the present stream, or the host, wait for what is under way on the stream of captures."""
        wait_for_others(torch.device("cuda", self._index), host)

    def _on_device(self) -> Any:
        return torch.cuda.device(self._index)

    def _recover(self) -> None:
        """Undo what a capture leaves behind that CUDA has broken off: PyTorch does not."""
        # Refused where nothing was left open; then the pool is not ours to release either.
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(self._index, self._pool)
            torch._C._cuda_releasePool(self._index, self._pool)
        # The generator would go on counting for the graph, and refuse every other use.
        generator = torch.cuda.default_generators[self._index]
        generator.graphsafe_set_state(generator.clone_state())
