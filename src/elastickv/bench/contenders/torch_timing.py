"""What peers on PyTorch tensors share: the device, the same random inputs, the clock, the check of what they compute."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from importlib import metadata
from time import perf_counter_ns
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from elastickv.attention.errors import relative_l2, summarise
from elastickv.bench.contenders.base import Contender, PeerWork
from elastickv.bench.contenders.rotation import Rotation
from elastickv.errors import KernelMismatch

TORCH_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp8": "float8_e4m3fn"}
# Relative L2 of a head's output. Rounding q, p and o to bf16 explains 3e-3; somebody else's kernel may round once more.
ERROR_LIMITS = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-2, "fp8": 1e-2}
# Tokens that the token-major layout is padded to.
PADDED_TO = 32


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
        context, head_dim), or token-major (batch, context padded with zeros, kv_heads, head_dim).
    kv_bytes : of the keys and values of one copy, without padding.
    rotation : round the copies.
    """

    def __init__(self, work: PeerWork, dtype: str, token_major: bool) -> None:
        import torch

        self._context, self._token_major = work.context, token_major
        shape, kind = work.shape, work.device.kind
        generator = torch.Generator(device=kind).manual_seed(work.seed)
        # What is stored in 8 bit is drawn in bf16 and cast, with a scale of 1.
        drawn = getattr(torch, TORCH_NAMES["bf16" if dtype == "fp8" else dtype])
        stored = getattr(torch, TORCH_NAMES[dtype])
        padded = -(-work.context // PADDED_TO) * PADDED_TO

        def random(*size: int) -> Any:
            return torch.randn(*size, device=kind, dtype=drawn, generator=generator)

        def plane() -> Any:
            rows = random(shape.batch, shape.kv_heads, work.context, shape.head_dim).to(stored)
            if not token_major:
                return rows
            moved = torch.zeros(shape.batch, padded, shape.kv_heads, shape.head_dim, device=kind, dtype=stored)
            moved[:, : work.context] = rows.transpose(1, 2)
            return moved

        self.kv_bytes = 2 * shape.batch * shape.kv_heads * work.context * shape.head_dim * stored.itemsize
        self.rotation = work.rotation_of(self.kv_bytes)
        queries = (shape.batch, shape.query_heads, 1, shape.head_dim)
        self.rows = [(random(*queries), plane(), plane()) for _ in range(self.rotation.copies)]

    @cached_property
    def expected(self) -> np.ndarray:
        """Float64 attention on copy 0: (batch, query_heads, head_dim)."""
        import torch

        queries, keys, values = self.rows[0]
        if self._token_major:
            keys, values = (plane[:, : self._context].transpose(1, 2) for plane in (keys, values))
        batch, kv_heads, _, head_dim = keys.shape
        output = torch.empty(batch, queries.shape[1], head_dim, dtype=torch.float64, device=queries.device)
        group = queries.shape[1] // kv_heads
        for row in range(batch):
            # Head by head: float64 copies of all of them may not fit.
            for head in range(kv_heads):
                heads = slice(head * group, (head + 1) * group)
                scores = queries[row, heads, 0].double() @ keys[row, head].double().T * head_dim**-0.5
                output[row, heads] = torch.softmax(scores, -1) @ values[row, head].double()
        return np.asarray(output.cpu().numpy())


_drawn: WeakValueDictionary[tuple[object, ...], Inputs] = WeakValueDictionary()


def inputs(work: PeerWork, dtype: str, token_major: bool = False) -> Inputs:
    """Return the inputs, drawn once for as long as a contender holds them.

    Parameters
    ----------
    dtype : of keys and values, 'fp32', 'fp16', 'bf16' or 'fp8'; with 'fp8' queries are bf16.
    """
    key = (work, dtype, token_major)
    drawn = _drawn.get(key)
    if drawn is None:
        drawn = _drawn[key] = Inputs(work, dtype, token_major)
    return drawn


class Clock:
    """Takes samples round the copies: on CUDA one captured graph between two events. Parameters as those of `checked`."""

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
            # Only the first output is kept: a captured graph writes it again at every replay.
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


def checked(
    name: str,
    version: str,
    dtype: str,
    work: PeerWork,
    data: Inputs,
    attend: Callable[[int], Any],
    rotation: Rotation | None = None,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Contender:
    """Return a peer's contender, whose output is right.

    Parameters
    ----------
    attend : attend copy i of `data`; returns the output.
    rotation : of a sample; that of `data` if None.
    around : what the steps of one sample run within.

    Raises
    ------
    KernelMismatch : if the output on copy 0 is not float64 attention within the error of the dtype.
    """
    rotation = rotation or data.rotation
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
        error=summarise(errors),
    )
