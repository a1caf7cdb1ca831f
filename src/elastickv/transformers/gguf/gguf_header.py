"""Read the header of a .gguf file; every count is checked against the file's size before memory is allocated.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

from elastickv.errors import UsageError

MAGIC = b"GGUF"
MAX_ENTRIES = 1 << 22  # fields, elements of lists and tensors together: a vocabulary has some hundred thousand
_VERSIONS = (2, 3)
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _LIST = 8, 9
_MAX_AXES = 4
_ALIGNMENT = "general.alignment"


def read_gguf_header(path: Path, name: str) -> dict[str, Any]:
    """Return the fields of a .gguf file.

    Parameters
    ----------
    name : the file's name in messages.

    Raises
    ------
    UsageError : if it cannot be read, is no regular file or no .gguf file, or does not hold what its header claims.
    """
    try:
        if not path.is_file():
            raise UsageError(f"model {name} is not a regular file: give a .gguf file")
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise UsageError(f"model {name} is not a .gguf file (it does not begin with GGUF): give one")
            return _Header(file).fields()
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"model {name}: {error.strerror or error}; give a .gguf file") from None
    except (ValueError, KeyError, OverflowError) as error:
        raise UsageError(f"model {name} is damaged or cut off ({error}): download it again") from None


class _Header:
    """Reads the header after the magic. Raises ValueError if it claims more than the file holds."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._bytes = file, os.fstat(file.fileno()).st_size
        self._left, self._entries = self._bytes - len(MAGIC), MAX_ENTRIES

    def fields(self) -> dict[str, Any]:
        """Return all fields. Raise ValueError if the tensors exceed the file."""
        if (version := self._number(4)) not in _VERSIONS:
            raise ValueError(f"version {version}; {' and '.join(map(str, _VERSIONS))}, little-endian, are read")
        tensors, count = self._counted(), self._counted()
        fields: dict[str, Any] = {}
        for _ in range(count):
            key = self._string()
            if key in fields:
                raise ValueError(f"it holds {key[:80]!r} twice")
            fields[key] = self._value(self._number(4))
        layers = fields.get(f"{fields.get('general.architecture')}.block_count", 0)
        if isinstance(layers, int) and layers > tensors:
            raise ValueError(f"{layers} layers in {tensors} tensors")
        end = max((self._tensor_end() for _ in range(tensors)), default=0)
        start = self._aligned(fields.get(_ALIGNMENT, 32))
        if tensors and start + end > self._bytes:
            raise ValueError(f"its tensors end at byte {start + end} and it has {self._bytes}")
        return fields

    def _take(self, count: int) -> bytes:
        if count > self._left:
            raise ValueError(f"{count} bytes are claimed where {self._left} are left")
        self._left -= count
        return self._file.read(count)

    def _number(self, kind: int) -> Any:
        form = _NUMBERS[kind]
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _counted(self) -> int:
        """Return a number of following entries."""
        count: int = self._number(10)
        self._entries -= count
        if self._entries < 0:
            raise ValueError(f"{count} entries are claimed where {MAX_ENTRIES} are accepted")
        return count

    def _string(self) -> str:
        return self._take(self._number(10)).decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _LIST:
            return self._of_kind(kind)
        inner, count = self._number(4), self._counted()
        return [self._string() if inner == _STRING else self._of_kind(inner) for _ in range(count)]

    def _of_kind(self, kind: int) -> Any:
        if kind not in _NUMBERS:
            raise ValueError(f"a value of type {kind}")
        return self._number(kind)

    def _tensor_end(self) -> int:
        """Return the end of the next tensor, as an offset from the start of the data."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name, axes = self._string(), self._number(4)
        if axes > _MAX_AXES:
            raise ValueError(f"{name[:80]} has {axes} axes")
        elements = math.prod(self._number(10) for _ in range(axes))
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(self._number(4))]
        size = int(elements // block * size)
        return size + int(self._number(10))

    def _aligned(self, alignment: Any) -> int:
        """Return the offset of the data: the first multiple of `alignment` after the header."""
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"{_ALIGNMENT} is {alignment}")
        read = self._bytes - self._left
        return read + -read % alignment
