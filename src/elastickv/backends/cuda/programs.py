"""Fixed sequences of decode steps, captured once as a graph and timed with device events."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from elastickv.backends.cuda.cache import CudaCache
from elastickv.backends.cuda.device import CudaDevice, DeviceMemory, check
from elastickv.backends.feedback import Feedback
from elastickv.kvcache.tensor_view import Float32

_NAN_WORD = 0x7FFFFFFF


class CudaProgram:
    """A sequence of kernels that is launched as a whole."""

    def __init__(
        self,
        device: CudaDevice,
        caches: Sequence[CudaCache],
        outputs: Sequence[DeviceMemory],
        queue: Callable[[], None],
        prepare: Callable[[], None],
        appends: int,
        graph: bool,
        kernels_per_step: int,
    ) -> None:
        self._device, self._caches, self._outputs = device, caches, outputs
        self._queue, self._prepare, self._appends = queue, prepare, appends
        self.kernels_per_step = kernels_per_step
        self.captured = graph
        self.nodes: int | None = None
        self._executable: Any = None
        for cache in caches:
            cache.mark()
        prepare()
        if graph:
            self._capture()

    def _capture(self) -> None:
        driver, stream = self._device.driver, self._device.stream
        for cache in self._caches:  # loading a kernel is not allowed during a capture
            cache.load()
        stream.sync()
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        with collecting_nothing():
            check(driver.cuStreamBeginCapture(stream.handle, mode))
            try:
                self._queue()
            except BaseException:
                driver.cuStreamEndCapture(stream.handle)  # Its error about the broken capture would hide the cause.
                raise
            graph = check(driver.cuStreamEndCapture(stream.handle))
        self.nodes = int(check(driver.cuGraphGetNodes(graph, 0))[1])
        self._executable = check(driver.cuGraphInstantiate(graph, 0))
        check(driver.cuGraphDestroy(graph))
        check(driver.cuGraphUpload(self._executable, stream.handle))
        stream.sync()

    def __del__(self) -> None:
        executable = getattr(self, "_executable", None)
        if executable is not None:
            self._device.driver.cuGraphExecDestroy(executable)

    def run(self, launches: int = 1) -> list[float]:
        """Launch `launches` times in sequence and return the milliseconds of each."""
        for cache in self._caches:
            cache.check_room(self._appends * launches)
            cache.expect_decodes(cache.step + bool(self._appends), cache.step + self._appends * launches)
        driver, stream = self._device.driver, self._device.stream
        flags = 0  # CU_EVENT_DEFAULT: with timing
        events = [check(driver.cuEventCreate(flags)) for _ in range(2 * launches)]
        try:
            for i in range(launches):
                check(driver.cuEventRecord(events[2 * i], stream.handle))
                if self._executable is None:
                    self._queue()
                else:
                    check(driver.cuGraphLaunch(self._executable, stream.handle))
                check(driver.cuEventRecord(events[2 * i + 1], stream.handle))
            stream.sync()
            for cache in self._caches:
                cache.advance(self._appends * launches)
            elapsed = getattr(driver, "cuEventElapsedTime_v2", driver.cuEventElapsedTime)
            return [float(check(elapsed(events[2 * i], events[2 * i + 1]))) for i in range(launches)]
        finally:
            for event in events:
                driver.cuEventDestroy(event)

    def reset(self) -> None:
        """Rewind the program's caches to their state at its creation."""
        for cache in self._caches:
            cache.rewind()
        self._prepare()

    def outputs(self) -> list[Float32]:
        """Return each cache's (batch, query_heads, head_dim) outputs of the last launch."""
        shapes = [(c.shape.batch, c.shape.query_heads, c.shape.head_dim) for c in self._caches]
        return [self._device.download(memory, shape, np.float32) for memory, shape in zip(self._outputs, shapes, strict=True)]


@contextmanager
def collecting_nothing() -> Iterator[None]:
    """Keep the garbage collector from freeing device memory during a capture, which would invalidate it."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _buffers(
    device: CudaDevice, caches: Sequence[CudaCache]
) -> tuple[list[DeviceMemory], list[DeviceMemory], list[DeviceMemory]]:
    """Return queries, outputs and log-sum-exps for each cache, poisoned."""
    sizes = [c.storage.layout for c in caches]
    return (
        [device.allocate(s.outputs, _NAN_WORD) for s in sizes],
        [device.allocate(s.outputs, _NAN_WORD) for s in sizes],
        [device.allocate(s.lse, _NAN_WORD) for s in sizes],
    )


def attention_program(
    device: CudaDevice, caches: Sequence[CudaCache], queries: Sequence[Float32], steps: int, graph: bool
) -> CudaProgram:
    """Return a program of `steps` decodes that cycle through `caches`."""
    query_buffers, outputs, lse = _buffers(device, caches)
    for cache, memory, array in zip(caches, query_buffers, queries, strict=True):
        cache.upload_queries(memory, array)

    def queue() -> None:
        for step in range(steps):
            i = step % len(caches)
            caches[i].launch_decode(query_buffers[i], outputs[i], lse[i])

    return CudaProgram(device, caches, outputs, queue, lambda: None, 0, graph, caches[0].kernels_to_decode)


def cycle_program(
    device: CudaDevice, caches: Sequence[CudaCache], first: Float32, feedback: Feedback, graph: bool
) -> CudaProgram:
    """Return a program whose launch is one token through all `caches` as layers."""
    query_buffers, outputs, lse = _buffers(device, caches)
    maps = (feedback.query, feedback.key, feedback.value)
    tables = np.concatenate(
        [np.concatenate([m.reflector, m.sign, m.permutation.astype(np.int32).view(np.float32)]) for m in maps]
    ).astype(np.float32)
    on_device = device.allocate(tables.nbytes)
    device.upload(on_device, tables)

    def queue() -> None:
        for i, cache in enumerate(caches):
            cache.launch_feedback(outputs[i - 1], query_buffers[i], on_device, feedback)
            cache.launch_decode(query_buffers[i], outputs[i], lse[i], len(caches) > 1)

    def prepare() -> None:
        # The first layer reads the last layer's output of the previous token; for the first token that is `first`.
        device.upload(outputs[-1], np.asarray(first, np.float32))

    return CudaProgram(device, caches, outputs, queue, prepare, 1, graph, 1 + caches[0].kernels_to_decode)
