"""Shared by peers on PyTorch tensors: the device, the same random inputs, the clock, the check of their outputs."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from importlib import metadata
from time import perf_counter_ns
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from elastickv.benchmark.contenders.base import Contender, PeerWork
from elastickv.benchmark.contenders.rotation import Rotation
from elastickv.errors import KernelMismatch
from elastickv.kvcache.error_metrics import relative_l2, summarize

TORCH_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp8": "float8_e4m3fn"}
# Relative L2 of a head's output. Rounding q, p and o to bf16 explains 3e-3; another kernel may round once more.
ERROR_LIMITS = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-2, "fp8": 1e-2}
# A peer can be 50 times slower than ours: a sample of it need not be longer than this.
SAMPLE_MS = 10.0
# Rounds of the copies that a slow peer takes at least: its check, its previews, and two samples.
LEAST_ROUNDS = 8


def distribution_version(name: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def unusable(work: PeerWork) -> str | None:
    """Make PyTorch use the work's device; return why it cannot, or None."""
    import torch

    if work.device.kind == "cpu":
        torch.set_num_threads(work.device.compute_units)
        return None
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} is built without CUDA or sees no device"
    torch.cuda.set_device(work.index)
    return None


class Inputs:
    """Queries, keys and values of every copy, the same numbers for every peer.

    Attributes
    ----------
    rows : (queries, keys, values) of each copy; queries (batch, query_heads, 1, head_dim); keys and values (batch, kv_heads,
        context, head_dim), or in pages (batch * pages, kv_heads, page_tokens, head_dim), the last one padded with zeros.
    kv_bytes : of the keys and values of one copy, without padding.
    rotation : round the copies.
    """

    def __init__(self, work: PeerWork, dtype: str, page_tokens: int | None) -> None:
        import torch

        self._work, self._page_tokens = work, page_tokens
        shape, kind = work.shape, work.device.kind
        generator = torch.Generator(device=kind).manual_seed(work.seed)
        # 8-bit values are drawn in bf16 and cast, with a scale of 1.
        drawn = getattr(torch, TORCH_NAMES["bf16" if dtype == "fp8" else dtype])
        stored = getattr(torch, TORCH_NAMES[dtype])

        def random(*size: int) -> Any:
            return torch.randn(*size, device=kind, dtype=drawn, generator=generator)

        def plane() -> Any:
            rows = random(shape.batch, shape.kv_heads, work.context, shape.head_dim).to(stored)
            if page_tokens is None:
                return rows
            pages = -(-work.context // page_tokens)
            padded = torch.zeros(shape.batch, shape.kv_heads, pages * page_tokens, shape.head_dim, device=kind, dtype=stored)
            padded[:, :, : work.context] = rows
            return padded.unflatten(2, (pages, page_tokens)).transpose(1, 2).flatten(0, 1)

        self.kv_bytes = 2 * shape.batch * shape.kv_heads * work.context * shape.head_dim * stored.itemsize
        self.rotation = work.rotation_of(self.kv_bytes)
        queries = (shape.batch, shape.query_heads, 1, shape.head_dim)
        self.rows = [(random(*queries), plane(), plane()) for _ in range(self.rotation.copies)]

    @cached_property
    def expected(self) -> np.ndarray:
        """Float64 attention on copy 0: (batch, query_heads, head_dim)."""
        import torch

        shape = self._work.shape
        queries, keys, values = self.rows[0]
        output = torch.empty(shape.batch, shape.query_heads, shape.head_dim, dtype=torch.float64, device=queries.device)
        for row in range(shape.batch):
            # Head by head: float64 copies of all of them may not fit.
            for head in range(shape.kv_heads):
                heads = slice(head * shape.group, (head + 1) * shape.group)
                scores = queries[row, heads, 0].double() @ self._of_head(keys, row, head).T * shape.head_dim**-0.5
                output[row, heads] = torch.softmax(scores, -1) @ self._of_head(values, row, head)
        return np.asarray(output.cpu().numpy())

    def _of_head(self, plane: Any, row: int, head: int) -> Any:
        if self._page_tokens is None:
            return plane[row, head].double()
        pages = plane.unflatten(0, (self._work.shape.batch, -1))[row, :, head]
        return pages.flatten(0, 1)[: self._work.context].double()


_drawn: WeakValueDictionary[tuple[object, ...], Inputs] = WeakValueDictionary()


def inputs(work: PeerWork, dtype: str, page_tokens: int | None = None) -> Inputs:
    """Return the inputs, drawn once for as long as a contender holds them.

    Parameters
    ----------
    dtype : of keys and values, 'fp32', 'fp16', 'bf16' or 'fp8'; with 'fp8' queries are bf16.
    page_tokens : size of the pages that keys and values lie in; None where they lie in one piece.
    """
    key = (work, dtype, page_tokens)
    drawn = _drawn.get(key)
    if drawn is None:
        drawn = _drawn[key] = Inputs(work, dtype, page_tokens)
    return drawn


class Clock:
    """Take samples over the copies: on CUDA one captured graph between two events. Parameters as those of `checked`."""

    def __init__(
        self,
        work: PeerWork,
        attend: Callable[[int], Any],
        rotation: Rotation,
        around: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        import torch

        self._attend, self._copies, self._steps, self._around = attend, rotation.copies, rotation.steps, around
        self.captured = work.graph and work.device.kind == "cuda"
        self._output: Any = None
        self.sample: Callable[[], float] = self._on_cpu
        if work.device.kind != "cuda":
            return
        self.sample = self._on_cuda
        # What the default stream prepared is complete.
        torch.cuda.synchronize()
        self._replay: Callable[[], None] = self._round
        self._stream = torch.cuda.Stream()
        with torch.cuda.stream(self._stream):
            self._round()
            torch.cuda.synchronize()
            if self.captured:
                captured = torch.cuda.CUDAGraph()
                with torch.cuda.graph(captured, stream=self._stream):
                    self._round()
                self._replay = captured.replay
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def _round(self) -> None:
        import torch

        with torch.inference_mode(), self._around():
            # Only the first output is stored: a captured graph writes it again at every replay.
            self._output = self._attend(0)
            for step in range(1, self._steps):
                self._attend(step % self._copies)

    def _on_cpu(self) -> float:
        start = perf_counter_ns()
        self._round()
        return (perf_counter_ns() - start) / 1e6 / self._steps

    def _on_cuda(self) -> float:
        import torch

        with torch.cuda.stream(self._stream):
            self._events[0].record()
            self._replay()
            self._events[1].record()
        self._events[1].synchronize()
        return float(self._events[0].elapsed_time(self._events[1])) / self._steps

    def fresh_output(self) -> np.ndarray:
        """Poison what a captured graph will write, take a sample, return the output of copy 0 in float64."""
        import torch

        if self.captured:
            with torch.inference_mode():
                self._output.fill_(float("nan"))
            torch.cuda.synchronize()
        self.sample()
        return np.asarray(self._output.double().cpu().numpy())


def _step_s(attend: Callable[[int], Any], around: Callable[[], AbstractContextManager[Any]]) -> float:
    """Return the seconds of a step on a CPU, after one that may compile."""
    import torch

    with torch.inference_mode(), around():
        attend(0)
        start = perf_counter_ns()
        attend(0)
        return (perf_counter_ns() - start) / 1e9


def checked(
    name: str,
    version: str,
    dtype: str,
    work: PeerWork,
    data: Inputs,
    attend: Callable[[int], Any],
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Contender:
    """Return a peer's contender after checking its output; a sample of a slow one has fewer steps, at least one round.

    Parameters
    ----------
    attend : attend copy i of `data`; returns the output.
    around : what the steps of one sample run within.

    Raises
    ------
    KernelMismatch : if the output on copy 0 is not float64 attention within the error of the dtype.
    UsageError : if the run's time limit leaves too little for it.
    """
    rotation = replace(data.rotation, steps=data.rotation.copies)
    if work.device.kind == "cpu":
        work.require_time(LEAST_ROUNDS * rotation.copies * _step_s(attend, around))
    clock = Clock(work, attend, rotation, around)
    steps = min(data.rotation.steps, max(rotation.steps, math.ceil(SAMPLE_MS / clock.sample())))
    if steps > rotation.steps:
        rotation = replace(rotation, steps=steps)
        clock = Clock(work, attend, rotation, around)
    errors = relative_l2(clock.fresh_output().reshape(data.expected.shape), data.expected)
    if not errors.max() <= ERROR_LIMITS[dtype]:
        raise KernelMismatch(f"its output is off by {errors.max():.2g} of float64 attention, above {ERROR_LIMITS[dtype]:g}")
    held: list[Any] = [clock, data]

    def close() -> None:
        held.clear()
        if work.device.kind == "cuda":
            import torch

            torch.cuda.empty_cache()

    return Contender(
        name,
        "peer",
        version,
        dtype,
        data.kv_bytes,
        rotation,
        lambda: float(held[0].sample()),
        clock.captured,
        None,
        None,
        close=close,
        error=summarize(errors),
    )
