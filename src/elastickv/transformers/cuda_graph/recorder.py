"""A pass through a model as one CUDA graph: rehearsed, captured, replayed."""

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
    """Records a pass whose inputs keep their addresses.

    Attributes
    ----------
    launches_speculatively : whether `launch_concurrently` is useful, because the host does not wait for a replay.
    """

    launches_speculatively: bool

    def rehearse(self, run: Pass) -> tuple[Any, str | None]:
        """Run a pass as it would be recorded; return its outputs, and where the host waits for the device, or None."""

    def record(self, run: Pass) -> Pass:
        """Record a pass without running it; return a function that runs it and returns the same tensors each time."""

    def new_event(self) -> torch.cuda.Event:
        """Return a new event for `launch_concurrently` to record."""

    def launch_concurrently(self, steps: Sequence[Pass], ends: Sequence[torch.cuda.Event]) -> None:
        """Queue `steps` after earlier work but independent of later work; record one of `ends` after each step."""

    def wait_for(self, end: torch.cuda.Event) -> None:
        """Make later work wait for an event."""

    def wait_for_others(self, host: bool = False) -> None:
        """Make later work, or the host, wait for everything queued by `launch_concurrently`, for any cache."""


def recorder_for(device: torch.device) -> Recorder | None:
    """Return a recorder for a device, or None where graphs are not supported."""
    return GraphRecorder(device) if device.type == "cuda" else None


def why_not(model: Any, wanted: bool) -> str | None:
    """Return why no pass of a model can be recorded, or None if some may be."""
    device = next(model.parameters()).device
    if not wanted:
        return "capture=False"
    return f"the model is on the {device.type}" if recorder_for(device) is None else None


@cache
def _capture_stream(index: int) -> Any:
    """Return the stream for recording, one per device: libraries keep a workspace for every stream."""
    return torch.cuda.Stream(index)


class GraphRecorder:
    """Records CUDA graphs that share one memory pool, because their replays never overlap."""

    launches_speculatively = True

    def __init__(self, device: torch.device) -> None:
        self._index = torch.cuda.current_device() if device.index is None else device.index
        self._pool = torch.cuda.graph_pool_handle()

    def rehearse(self, run: Pass) -> tuple[Any, str | None]:
        """Run a pass on the capture stream, so that one-time loading and allocation happen outside of a graph."""
        before = torch.cuda.get_sync_debug_mode()
        with self._on_device(), warnings.catch_warnings(record=True) as caught:
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
        for warning in caught:
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
                # Other threads, such as a communication library's, may continue to call CUDA.
                with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                    try:
                        outputs = run()
                    except BaseException as error:
                        first = error
                        raise
            except BaseException as error:
                torch.cuda.set_stream(present)
                self._recover()
                # Ending a broken capture raises a second, less specific error.
                cause = first or error
                try:
                    raise cause from None
                finally:
                    # Break the reference cycle of exception and frame: it would keep the cache alive.
                    del cause, first

        def replay() -> Any:
            graph.replay()
            return outputs

        return replay

    def new_event(self) -> torch.cuda.Event:
        """Return a new event."""
        return torch.cuda.Event()

    def launch_concurrently(self, steps: Sequence[Pass], ends: Sequence[torch.cuda.Event]) -> None:
        """Queue `steps` on the capture stream."""
        with self._on_device():
            present, stream = torch.cuda.current_stream(), _capture_stream(self._index)
            stream.wait_stream(present)
            try:
                with torch.cuda.stream(stream):
                    for step, end in zip(steps, ends, strict=True):
                        step()
                        end.record()
            finally:
                # Even if a step failed: earlier ones are queued.
                ends[-1].record(stream)
                note_in_flight(torch.device("cuda", self._index), ends[-1])

    def wait_for(self, end: torch.cuda.Event) -> None:
        """Make the present stream wait for an event."""
        end.wait(torch.cuda.current_stream(self._index))

    def wait_for_others(self, host: bool = False) -> None:
        """Make the present stream, or the host, wait for the decode in flight on the capture stream."""
        wait_for_others(torch.device("cuda", self._index), host)

    def _on_device(self) -> Any:
        return torch.cuda.device(self._index)

    def _recover(self) -> None:
        """Clean up after a capture that CUDA aborted, which PyTorch does not do."""
        # These raise where no allocation was open; then the pool must not be released either.
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(self._index, self._pool)
            torch._C._cuda_releasePool(self._index, self._pool)
        # The generator would stay registered with the graph, and refuse every other use.
        generator = torch.cuda.default_generators[self._index]
        generator.graphsafe_set_state(generator.clone_state())
