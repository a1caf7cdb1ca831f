"""The backends that properties are tested on: how each is opened and poisoned, and its largest permitted error."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from elastickv.kvcache import LayerCache, TensorView
from elastickv.kvcache.rounding import from_bf16_bits, to_bf16_bits
from elastickv.recipe import HEAD_DIMS, Recipe
from tests.helpers.cases import GROUPS, Case

KINDS = ("reference", "cpu", "cuda", "cuda simt")
NAN_WORD = 0x7FFFFFFF  # a NaN as float32, as two fp16 and as two bf16
_STORAGE = ("cold", "exact", "bounds", "lists", "reused", "tail")
_SCRATCH = ("partial", "scores", "work", "step_keys", "step_values", "step_queries", "step_outputs", "step_lse")
_PLANES = ("exact_k", "exact_v", "cold_k", "cold_v", "k_scale", "v_scale", "cold_pages")


ELEMENTS = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}


class DeviceTensor:
    """A tensor in the memory of a cache's device, made of a float32 array; `strides` are those of the array."""

    def __init__(self, cache: Any, array: np.ndarray, dtype: str = "fp32") -> None:
        elements = to_bf16_bits(array) if dtype == "bf16" else np.asarray(array, ELEMENTS[dtype])
        strides = np.array(array.strides) // array.itemsize
        last = int(((np.array(array.shape) - 1) * strides).sum()) + 1
        self._buffer = np.zeros(max(last, 1), elements.dtype)
        where = np.lib.stride_tricks.as_strided(self._buffer, array.shape, [n * elements.itemsize for n in strides])
        where[...] = elements
        self._device = getattr(cache, "_device", None)
        address = self._buffer.ctypes.data
        if self._device is not None:
            self._memory = self._device.allocate(self._buffer.nbytes)
            self._device.upload(self._memory, self._buffer)
            address = self._memory.pointer
        self.view = TensorView(address, dtype, array.shape, tuple(int(n) for n in strides))

    def array(self) -> np.ndarray:
        """Return what is in a contiguous tensor now, as float32."""
        raw = self._buffer
        if self._device is not None:
            raw = self._device.download(self._memory, raw.shape, raw.dtype)
        values = from_bf16_bits(raw) if self.view.dtype == "bf16" else raw.astype(np.float32)
        return values.reshape(self.view.shape)


@dataclass(frozen=True)
class Kind:
    """A backend under test.

    Attributes
    ----------
    repeats : whether a head gives the same bits at any position in the cache.
    head_dims, groups : shapes to draw from: on a GPU each one costs a compilation.
    """

    name: str
    backend: Any

    @property
    def repeats(self) -> bool:
        return self.name == "cpu"  # the reference multiplies matrices by what NumPy has: rows depend on where they lie

    @property
    def head_dims(self) -> tuple[int, ...]:
        return (64, 80, 128) if self.name.startswith("cuda") else HEAD_DIMS

    @property
    def groups(self) -> tuple[int, ...]:
        return (1, 4, 7) if self.name.startswith("cuda") else GROUPS

    def new(self, case: Case, room: int = 0, recipe: Recipe | None = None) -> LayerCache:
        """Return a cache for a case and `room` further tokens, its memory poisoned."""
        recipe = recipe or case.recipe
        cache = self.backend.cache(case.shape, max(case.lengths) + room, case.dtype, recipe, case.anchor_offset)
        self._poison_storage(cache)
        self.poison(cache)
        return cache

    def filled(self, case: Case, room: int = 0) -> tuple[LayerCache, np.ndarray]:
        """Return a cache that holds a case's prompt, and the queries to ask it with."""
        keys, values, queries = case.prompt()
        cache = self.new(case, room)
        cache.prefill(keys, values, np.array(case.lengths))
        return cache, queries

    def decode(self, cache: LayerCache, queries: np.ndarray):
        """Decode with results and scratch poisoned before."""
        self.poison(cache)
        return cache.decode(queries)

    def _poison_storage(self, cache: Any) -> None:
        """Make NaN, or garbage, of all memory in which tokens will lie: nothing may be read before it is written."""
        if self.name == "reference":
            cache._keys[...], cache._values[...] = np.nan, np.nan
        elif self.name == "cpu":
            for section in _STORAGE:
                cache._section(section)[:] = 0xFF
            cache.mark()
        else:
            for plane in _PLANES:
                cache._device.fill(getattr(cache.storage, plane), NAN_WORD)

    def poison(self, cache: Any) -> None:
        """Make NaN of everything that a step is to write."""
        if self.name == "cpu":
            for section in _SCRATCH:
                cache._section(section)[:] = 0xFF
        elif self.name != "reference":
            scratch = cache._scratch
            for memory in (cache.storage.outputs, cache.storage.lse, scratch.partial, scratch.partial_ml, scratch.scores):
                cache._device.fill(memory, NAN_WORD)

    def limit(self, case: Case) -> float:
        """Relative L2 error that kernels may have on ordinary numbers."""
        if self.name == "reference":
            return 1e-12
        return 1e-5 if case.exact == "fp32" else 4e-3

    def rounding(self, case: Case) -> float:
        """How far results on the same codes may lie apart where the work is cut otherwise."""
        return {"reference": 1e-12, "cpu": 1e-5}.get(self.name, self.limit(case))

    def operand_rounding(self, case: Case) -> float:
        """Relative error of an operand, a query or a probability, in the kernel's own arithmetic."""
        if self.name == "reference":
            return 1e-14
        whole = {"int8", "int4", "int3", "int2"} & {case.recipe.key_format, case.recipe.value_format}
        if self.name == "cpu":
            return 2.0**-15 if whole else 2.0**-18
        return {"fp32": 2.0**-18, "fp16": 2.0**-10, "bf16": 2.0**-7}[case.exact]


def opened(name: str, request: Any) -> Kind:
    """Open a kind of backend; skips a GPU's where there is none."""
    if name == "reference":
        from tests.helpers.reference_backend import ReferenceBackend

        return Kind(name, ReferenceBackend())
    if name == "cpu":
        from elastickv.backends.cpu import open_backend

        return Kind(name, open_backend(None))
    return Kind(name, request.getfixturevalue("open_cuda")("simt" if "simt" in name else "auto"))
