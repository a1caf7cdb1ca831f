"""Let Transformers parse a .gguf file once. Its loader does so for the configuration, the weights and the tokenizer each."""

from __future__ import annotations

import sys
import threading
from functools import cache
from types import TracebackType
from typing import Any

_LOCK = threading.RLock()


class GgufReaders:
    """Inside its blocks the `gguf` package returns the same reader for the same file, and the same map of tensor names.

    The map, which depends on the architecture alone, is made for every module of a model otherwise. Readers are kept as long as
    this object; one thread at a time is inside a block.
    """

    def __init__(self) -> None:
        import gguf
        import numpy as np

        class Reader(gguf.GGUFReader):  # type: ignore[misc]
            """Slices plain arrays, which takes a third of the time that a `numpy.memmap` takes.

            Elements of lists are read without an array for each length: a vocabulary has hundreds of thousands.
            """

            @property
            def data(self) -> Any:
                return self._data

            @data.setter
            def data(self, mapped: Any) -> None:
                self._data: Any = np.asarray(mapped)

            def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
                kinds = gguf.GGUFValueType
                if raw_type != kinds.ARRAY or self.byte_order != "I":
                    return super()._get_field_parts(orig_offs, raw_type)
                head = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
                kind, count, start = kinds(head[0][0]), int(head[1][0]), orig_offs + 12
                if kind == kinds.STRING:
                    elements, end = self._strings(start, count)
                elif kind in self.gguf_scalar_to_np:
                    numbers = self._get(start, self.gguf_scalar_to_np[kind], count)
                    elements, end = list(numbers.reshape(-1, 1)), start + numbers.nbytes
                else:
                    return super()._get_field_parts(orig_offs, raw_type)
                types = [kinds.ARRAY, *([kind] if count else [])]
                return end - orig_offs, [*head, *elements], list(range(2, 2 + count)), types

            def _strings(self, start: int, count: int) -> tuple[list[Any], int]:
                """Return views of the bytes of strings, and where the last one ends."""
                held, strings = memoryview(self._data), []
                for _ in range(count):
                    text = start + 8
                    end = text + int.from_bytes(held[start:text], sys.byteorder)
                    strings.append(held[text:end])
                    start = end
                return strings, start

        self._module = gguf
        self._shared = {"GGUFReader": cache(Reader), "get_tensor_name_map": cache(gguf.get_tensor_name_map)}
        self._replaced: list[dict[str, Any]] = []

    def __enter__(self) -> None:
        _LOCK.acquire()
        self._replaced.append({name: getattr(self._module, name) for name in self._shared})
        vars(self._module).update(self._shared)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        vars(self._module).update(self._replaced.pop())
        _LOCK.release()
