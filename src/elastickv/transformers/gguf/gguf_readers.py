"""Let Transformers parse a .gguf file once. Its loader does so for the configuration, the weights and the tokenizer each."""

from __future__ import annotations

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

        class Reader(gguf.GGUFReader):  # type: ignore[misc]
            """Slices plain arrays, which takes a third of the time that a `numpy.memmap` takes."""

            @property
            def data(self) -> Any:
                return self._data

            @data.setter
            def data(self, mapped: Any) -> None:
                import numpy as np

                self._data = np.asarray(mapped)

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
