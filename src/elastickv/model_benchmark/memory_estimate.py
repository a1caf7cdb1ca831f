"""Memory of a model, its caches and a prompt: estimated before anything is built, measured while it runs."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from elastickv.backends import load
from elastickv.errors import UsageError
from elastickv.model_benchmark.shapes import Shape
from elastickv.recipe import FORMATS, AttentionShape, Recipe, for_ratio, resolve, stored_bytes
from elastickv.transformers.memory import trim_heap
from elastickv.transformers.model_loading import Loaded
from elastickv.transformers.model_support import sizes_of, text_config

GIB = 1 << 30
_TRIED = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
_LEAST_CONTEXT = 256
# Rows of the residual stream and of the feed-forward layer that a prompt's pass holds at once, roughly.
_HIDDEN_ROWS, _INTERMEDIATE_ROWS = 6, 3
# For what is not counted: fragments, the allocator's rounding, logits.
_SLACK = 1.05
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5), clear_refs


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory that a run of a model would take.

    Attributes
    ----------
    name, weights_bytes : of the model.
    layers, attention : layers that have an elastic cache, and the shape of one for all rows.
    hidden, intermediate : channels of the residual stream and of the feed-forward layers.
    dtype : 'fp32', 'fp16' or 'bf16'.
    """

    name: str
    weights_bytes: int
    layers: int
    attention: AttentionShape
    hidden: int
    intermediate: int
    dtype: str

    @classmethod
    def of_shape(cls, name: str, shape: Shape, dtype: str, batch: int) -> MemoryEstimate:
        """Return the estimate for a model of a published shape that is not built yet."""
        attention = AttentionShape(batch, shape.query_heads, shape.kv_heads, shape.head_dim)
        return cls(name, shape.weights_bytes(dtype), shape.layers, attention, shape.hidden, shape.intermediate, dtype)

    @classmethod
    def of_model(cls, loaded: Loaded, dtype: str, batch: int) -> MemoryEstimate:
        """Return the estimate for a loaded model."""
        sizes, text = sizes_of(loaded.model), text_config(loaded.model)
        attention = AttentionShape(batch, sizes.query_heads, sizes.kv_heads, sizes.stored_head_dim)
        intermediate = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
        weights = sum(weight.nbytes for weight in loaded.model.parameters())
        return cls(loaded.name, weights, len(sizes.elastic), attention, text.hidden_size, intermediate, dtype)

    @property
    def element_bytes(self) -> int:
        """Size of an element of `dtype`."""
        return FORMATS[self.dtype].bits // 8

    def prompt_bytes(self, tokens: int) -> int:
        """Return roughly the bytes that a prompt's pass takes in addition to weights and caches."""
        rows = self.attention.batch * tokens * self.element_bytes
        return rows * (_HIDDEN_ROWS * self.hidden + _INTERMEDIATE_ROWS * self.intermediate)

    def elastic_bytes(self, tokens: int, recipe: Recipe) -> int:
        """Return the bytes of an elastic cache whose layers all have one recipe."""
        one = replace(self.attention, batch=1)
        return self.layers * self.attention.batch * stored_bytes(recipe, [tokens], one, self.dtype)

    def check(self, tokens: int, wanted: Mapping[str, Any], free_bytes: int, loaded: bool = False) -> None:
        """Check that the model fits with an elastic cache.

        Parameters
        ----------
        tokens : of prompt and text, a row.
        wanted : compress and recipe, as `ElasticCache.for_model` takes them.
        loaded : whether the weights are in memory already.

        Raises
        ------
        UsageError : if it does not fit; says how much is needed, and which ratio or context would fit.
        """
        weights = 0 if loaded else self.weights_bytes
        free = free_bytes / _SLACK

        def needed(count: int, ratio: float | None) -> float:
            recipe = self._recipe(count, wanted) if ratio is None else self._solved(ratio, count)
            return weights + self.elastic_bytes(count, recipe) + self.prompt_bytes(count)

        if needed(tokens, None) <= free:
            return
        rows = "" if self.attention.batch == 1 else f"{self.attention.batch} x "
        ratios = [ratio for ratio in _TRIED if ratio > (wanted.get("compress") or 1) and needed(tokens, ratio) <= free]
        lengths = [1 << power for power in range(tokens.bit_length(), 7, -1) if 1 << power < tokens]
        contexts = [length for length in lengths if length >= _LEAST_CONTEXT and needed(length, None) <= free]
        remedies = [f"`compress={ratios[0]:g}`"] if ratios else []
        remedies += [f"`context={contexts[0]}`"] if contexts else []
        remedy = " or ".join(remedies) + " would fit" if remedies else "nothing shorter would fit: a smaller model or dtype may"
        parts = "" if loaded else f" ({self.weights_bytes / GIB:.1f} of them weights)"
        raise UsageError(
            f"{self.name} in {self.dtype} with {rows}{tokens} tokens needs about {_SLACK * needed(tokens, None) / GIB:.1f} GiB"
            f"{parts} and {free_bytes / GIB:.1f} GiB are free; {remedy}"
        )

    def _recipe(self, tokens: int, wanted: Mapping[str, Any]) -> Recipe:
        text, ratio = wanted.get("recipe"), wanted.get("compress")
        if isinstance(text, str) and ratio is None:
            try:
                return Recipe.parse(text)
            except UsageError:
                return self._solved(1.0, tokens)  # a file: counted as if nothing were compressed
        if isinstance(text, str) and ratio is not None:
            return resolve(text, ratio, tokens, replace(self.attention, batch=1), self.dtype)
        return self._solved(ratio or 1.0, tokens)

    def _solved(self, ratio: float, tokens: int) -> Recipe:
        one = replace(self.attention, batch=1)
        try:
            return for_ratio(ratio, tokens, one, self.dtype)
        except UsageError:
            return for_ratio(1.0, tokens, one, self.dtype)


class Footprint:
    """The memory that the watched blocks of code hold together, and their peak.

    On CUDA the figures come from PyTorch's allocator and, for memory taken past it, from the driver. On Linux they are the
    process's resident memory. Other systems cannot reset the peak: nothing is measured there.

    Attributes
    ----------
    source : 'torch allocator and driver', 'resident memory' or None.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held = self._peak = 0
        self._began = False
        self.source = "torch allocator and driver" if device.type == "cuda" else "resident memory" if _resettable() else None

    @property
    def peak_bytes(self) -> int | None:
        """The peak; None where it is not measured."""
        return None if self.source is None else self._peak

    @property
    def held_bytes(self) -> int | None:
        """Bytes held now; None where they are not measured."""
        return None if self.source is None else self._held

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Count what is allocated and freed from here to the end of the block."""
        if self.source is None:
            yield
            return
        if not self._began:
            self._began = True
            give_back(self._device)
        self._reset()
        before = self._now()
        try:
            yield
        finally:
            self._peak = max(self._peak, self._held + self._most() - before)
            self._held += self._now() - before

    def _reset(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")

    def _now(self) -> int:
        if self._device.type != "cuda":
            return _status("VmRSS")
        return int(torch.cuda.memory_allocated(self._device)) + past_allocator(self._device)

    def _most(self) -> int:
        if self._device.type != "cuda":
            return _status("VmHWM")
        # Memory taken past the allocator is not freed: its peak is at the end.
        return int(torch.cuda.max_memory_allocated(self._device)) + past_allocator(self._device)


def past_allocator(device: torch.device) -> int:
    """Return the bytes of a CUDA device that were not allocated by PyTorch: backends' caches, code, graphs."""
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free - torch.cuda.memory_reserved(device))


def free_bytes(device: torch.device | str) -> int:
    """Return the free memory of a device. On CUDA, memory that PyTorch caches for reuse counts as free."""
    device = torch.device(device)
    if device.type != "cuda":
        return load("cpu")[0].device.free_bytes
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + reusable)


def give_back(device: torch.device) -> None:
    """Return freed memory to the system: reusing it would not be seen, and code outside PyTorch could not use it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        trim_heap()


def _resettable() -> bool:
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")
        return _status("VmHWM") > 0
    except OSError:
        return False


def _status(name: str) -> int:
    """Return a figure of /proc/self/status in bytes; 0 where the system has none."""
    match = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
    return int(match[1]) << 10 if match else 0
