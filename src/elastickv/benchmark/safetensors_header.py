"""The header of a safetensors file, checked against the file's size before anything is allocated.

Format: 8 bytes, little-endian length of the header; the header, JSON; the tensors' bytes, without gaps.
https://github.com/huggingface/safetensors#format
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from elastickv.errors import UsageError
from elastickv.inputs import parse_json

DTYPE_BYTES: dict[str, int] = {"F32": 4, "F16": 2, "BF16": 2}
MAX_HEADER_BYTES = 1 << 20
MAX_AXES = 8
_LENGTH_BYTES = 8
_REMEDY = "write it with safetensors as docs/bench.md says, or copy it again"


@dataclass(frozen=True)
class TensorEntry:
    """The position of one tensor.

    Attributes
    ----------
    dtype : 'F32', 'F16' or 'BF16'.
    shape : as written.
    start : offset of its first byte from the start of the file.
    n_bytes : its length.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    n_bytes: int


def read_header(
    path: Path, names: tuple[str, ...], further: re.Pattern[str] | None = None
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Return the entries of the tensors `names`, and of those that match `further`, and the file's metadata.

    Raises
    ------
    UsageError : if the file cannot be read, is no safetensors file, is cut short, or lacks one of the tensors.
    """
    try:
        if not path.is_file():
            what = "is not a file" if path.exists() else "does not exist"
            raise UsageError(f"input {path} {what}: give a safetensors file")
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_LENGTH_BYTES)
            length = int.from_bytes(start, "little")
            raw = file.read(length) if len(start) == _LENGTH_BYTES and length <= MAX_HEADER_BYTES else b""
    except OSError as error:
        raise UsageError(f"input {path} cannot be read: {error.strerror or error}; give a safetensors file") from error
    _refuse_other_formats(path, start, raw, length)
    if len(raw) != length:
        _refuse(path, f"is cut short: its header should be {length} bytes and {len(raw)} are there")
    try:
        header: Any = parse_json(raw)
    except ValueError as error:
        _refuse(path, f"is not a safetensors file: its header is not JSON ({error})")
    if not isinstance(header, dict):
        _refuse(path, "is not a safetensors file: its header is not a JSON object")
    tensors = sorted(name for name in header if name != "__metadata__")
    missing = [name for name in names if name not in header]
    if missing:
        raise UsageError(
            f"input {path} has no tensor {', '.join(map(repr, missing))}: it holds {', '.join(tensors) or 'nothing'}; "
            f"{', '.join(names)} are needed (docs/bench.md)"
        )
    data_start = _LENGTH_BYTES + length
    wanted = [*names, *(name for name in tensors if name not in names and further and further.fullmatch(name))]
    entries = {name: _entry(path, name, header[name], data_start, file_bytes) for name in wanted}
    metadata = header.get("__metadata__") or {}
    if not isinstance(metadata, dict):
        _refuse(path, "is not a safetensors file: its metadata is not a JSON object")
    return entries, {str(key): str(value) for key, value in metadata.items()}


def _refuse(path: Path, what: str) -> NoReturn:
    raise UsageError(f"input {path} {what}; {_REMEDY}")


def _refuse_other_formats(path: Path, start: bytes, raw: bytes, length: int) -> None:
    # A pickle is never opened, not even to say more about it: loading one runs its code.
    known = {
        b"\x80": "a pickle",
        b"PK\x03\x04": "a zip archive (torch.save or .npz)",
        b"\x93NUMPY": "a .npy file",
        b"GGUF": "GGUF",
    }
    for magic, name in known.items():
        if start.startswith(magic) and not raw.startswith(b"{"):
            raise UsageError(f"input {path} is {name}: only safetensors is accepted; {_REMEDY}")
    if len(start) < _LENGTH_BYTES:
        _refuse(path, f"is not a safetensors file: it holds {len(start)} bytes")
    if length > MAX_HEADER_BYTES:
        _refuse(
            path, f"is not a safetensors file: its header claims {length} bytes and at most {MAX_HEADER_BYTES} are accepted"
        )


def _entry(path: Path, name: str, entry: Any, data_start: int, file_bytes: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        _refuse(path, f"is corrupt: the header's entry of {name!r} lacks dtype, shape or data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise UsageError(f"input {path}: tensor {name!r} is {dtype}; {', '.join(DTYPE_BYTES)} are accepted: convert it")
    numbers = (*shape, begin, end)
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
        _refuse(path, f"is corrupt: the header's entry of {name!r} holds a size that is no whole number from 0 up")
    if len(shape) > MAX_AXES:
        _refuse(path, f"is corrupt: {name!r} has {len(shape)} axes")
    n_bytes = DTYPE_BYTES[dtype] * math.prod(shape)
    if end - begin != n_bytes:
        _refuse(
            path, f"is corrupt: {name!r} of shape {list(shape)} in {dtype} is {n_bytes} bytes, its offsets span {end - begin}"
        )
    if data_start + end > file_bytes:
        _refuse(path, f"is cut short: {name!r} ends at byte {data_start + end} and the file has {file_bytes}")
    return TensorEntry(dtype, shape, data_start + begin, n_bytes)
