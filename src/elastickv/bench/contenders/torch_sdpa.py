"""PyTorch's scaled_dot_product_attention: flash, cuDNN, memory-efficient on CUDA; flash on the CPU."""

import itertools
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from typing import Any

from elastickv.backends import Backend
from elastickv.bench.contenders.base import Contender
from elastickv.bench.contenders.rotation import Rotation
from elastickv.recipe import FORMATS, AttentionShape

_VARIANTS = {"cuda": ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"), "cpu": ("FLASH_ATTENTION",)}
_DTYPES = {"cuda": ("bf16",), "cpu": ("fp32", "bf16")}
_TORCH_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class TorchSdpa:
    """One query per sequence over the whole context, inputs rotated as ours are.

    Groups through `enable_gqa`, and folded: the query heads of a group as queries of one head.
    """

    name = "torch-sdpa"

    def version(self) -> str | None:
        """Return PyTorch's version, or None."""
        try:
            return metadata.version("torch")
        except metadata.PackageNotFoundError:
            return None

    def contenders(
        self, backend: Backend, shape: AttentionShape, context: int, rotation: Rotation, seed: int, graph: bool
    ) -> tuple[list[Contender], dict[str, str]]:
        """Return the SDPA back ends that run this shape, and why the others do not."""
        import torch

        kind = backend.device.kind
        if kind == "cuda" and not torch.cuda.is_available():
            return [], {self.name: f"PyTorch {torch.__version__} is built without CUDA"}
        if kind == "cpu":
            torch.set_num_threads(backend.device.compute_units)
        # PyTorch's CPU path can be 50 times slower than ours: one round of the copies is a sample.
        rotation = rotation if kind == "cuda" else replace(rotation, steps=rotation.copies)
        forms = {"": False, "-folded": True} if shape.group > 1 else {"": False}
        ready, refused = [], {}
        for dtype in _DTYPES[kind]:
            inputs = _inputs(torch, kind, shape, context, rotation.copies, dtype, seed)
            kv_bytes = 2 * shape.batch * shape.kv_heads * context * FORMATS[dtype].row_bytes(shape.head_dim)
            for variant, (form, folded) in itertools.product(_VARIANTS[kind], forms.items()):
                name = f"torch-sdpa-{variant.removesuffix('_ATTENTION').lower()}{form}-{dtype}"
                rows = [(_folded(q, shape) if folded else q, k, v) for q, k, v in inputs]
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    try:
                        timed = _timed(torch, kind, variant, rows, rotation.steps, graph)
                        timed()
                    except RuntimeError as error:
                        refused[name] = _reason(said, error)
                        continue
                ready.append(_contender(torch, name, dtype, kv_bytes, rotation, timed, kind == "cuda" and graph))
        return ready, refused


def _contender(
    torch: Any, name: str, dtype: str, kv_bytes: float, rotation: Rotation, timed: Callable[[], float], captured: bool
) -> Contender:
    held = [timed]

    def close() -> None:
        held.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    version, take = torch.__version__, lambda: held[0]()
    return Contender(name, "peer", version, dtype, kv_bytes, rotation, take, captured, None, None, close=close)


def _reason(said: list[warnings.WarningMessage], error: RuntimeError) -> str:
    """Return why a variant was refused: PyTorch says so in a warning, and raises "No available kernel"."""
    told = [str(warning.message).partition(" (Triggered")[0] for warning in said]
    told = [text for text in told if not text.endswith("because:") and "runtime disabled" not in text]
    return told[0] if told else str(error).splitlines()[0]


def _folded(queries: Any, shape: AttentionShape) -> Any:
    """Return the query heads of a group as queries of one head: without a mask the same attention, and often faster."""
    return queries.reshape(shape.batch, shape.kv_heads, shape.group, shape.head_dim)


def _inputs(torch: Any, kind: str, shape: AttentionShape, context: int, copies: int, dtype: str, seed: int) -> list[Any]:
    generator = torch.Generator(device=kind).manual_seed(seed)

    def random(*size: int) -> Any:
        return torch.randn(*size, device=kind, dtype=getattr(torch, _TORCH_NAMES[dtype]), generator=generator)

    keys = (shape.batch, shape.kv_heads, context, shape.head_dim)
    return [(random(shape.batch, shape.query_heads, 1, shape.head_dim), random(*keys), random(*keys)) for _ in range(copies)]


def _timed(torch: Any, kind: str, variant: str, inputs: list[Any], steps: int, graph: bool) -> Callable[[], float]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    grouped = inputs[0][0].shape[1] != inputs[0][1].shape[1]

    def attend() -> None:
        with torch.inference_mode(), sdpa_kernel(getattr(SDPBackend, variant)):
            for i in range(steps):
                q, k, v = inputs[i % len(inputs)]
                torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)

    if kind == "cpu":

        def on_cpu() -> float:
            start = time.perf_counter_ns()
            attend()
            return (time.perf_counter_ns() - start) / 1e6 / steps

        return on_cpu
    run: Callable[[], None] = attend
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        attend()
        torch.cuda.synchronize()
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured, stream=stream):
                attend()
            run = captured.replay
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def on_cuda() -> float:
        with torch.cuda.stream(stream):
            events[0].record()
            run()
            events[1].record()
        events[1].synchronize()
        return float(events[0].elapsed_time(events[1])) / steps

    return on_cuda
