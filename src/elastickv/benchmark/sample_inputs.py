"""Queries, keys and values of real layers over consecutive positions."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from elastickv.benchmark.safetensors_header import TensorEntry, read_header
from elastickv.errors import UsageError
from elastickv.kvcache.rounding import from_bf16_bits
from elastickv.recipe import AttentionShape

Float32 = NDArray[np.float32]
SAMPLE_PATH = Path(__file__).parent / "data" / "smollm2-135m-4k.safetensors"
MIN_QUERIES = 64
_NAMES = ("q", "k", "v")
_EARLIER = re.compile(r"q_[1-9][0-9]{0,8}")
_AXES = {
    "q": ("layers", "query_heads", "queries", "head_dim"),
    "k": ("layers", "kv_heads", "tokens", "head_dim"),
    "v": ("layers", "kv_heads", "tokens", "head_dim"),
}


@dataclass(frozen=True, eq=False)
class Sample:
    """Attention inputs of some layers of a real model, after rotary embedding.

    Query i stands at position `tokens - queries + i`: it attends to the keys up to and including that position.

    Attributes
    ----------
    q : (layers, query_heads, queries, head_dim) float32, the last `queries` consecutive positions.
    k, v : (layers, kv_heads, tokens, head_dim) float32.
    name : the file's name without its suffix.
    metadata : what the file says of itself: model, text, layers, licence, ...
    earlier : further queries, as `q`, by the number of tokens that the last of them sees.
    """

    q: Float32
    k: Float32
    v: Float32
    name: str
    metadata: Mapping[str, str]
    earlier: Mapping[int, Float32] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        """How many layers were captured."""
        return int(self.k.shape[0])

    @property
    def tokens(self) -> int:
        """Positions that have a key and a value."""
        return int(self.k.shape[2])

    @property
    def queries(self) -> int:
        """Positions that have a query: the last ones."""
        return int(self.q.shape[2])

    def at(self, context: int) -> "Sample":
        """Return its first tokens, as many as have queries at their end and are nearest to `context` as a ratio."""
        ends = {self.tokens: self.q} | dict(self.earlier)
        tokens = min(ends, key=lambda end: (max(end, context) / min(end, context), end))
        k, v = (np.ascontiguousarray(each[:, :, :tokens]) for each in (self.k, self.v))
        return replace(self, q=ends[tokens], k=k, v=v, earlier={})

    @property
    def shape(self) -> AttentionShape:
        """The shape of one layer, at batch 1."""
        return AttentionShape(1, self.q.shape[1], self.k.shape[1], self.k.shape[3])

    @property
    def query_rms(self) -> float:
        """Root mean square of the queries' elements."""
        return _rms(self.q)

    @property
    def key_rms(self) -> float:
        """Root mean square of the keys' elements."""
        return _rms(self.k)

    @property
    def value_rms(self) -> float:
        """Root mean square of the values' elements."""
        return _rms(self.v)


def load_sample(path: Path | None = None) -> Sample:
    """Return the attention inputs in a safetensors file; the shipped sample when `path` is None.

    Parameters
    ----------
    path : a file as docs/bench.md describes it.

    Raises
    ------
    UsageError : if the file cannot be read, is no safetensors file, is cut short, or its tensors do not fit together; also
        if a value is not finite. Sizes are checked before anything is allocated.
    """
    source = SAMPLE_PATH if path is None else Path(path)
    entries, metadata = read_header(source, _NAMES, _EARLIER)
    _check_shapes(source, {name: entry.shape for name, entry in entries.items() if name in _NAMES})
    earlier = {int(name[2:]): entry for name, entry in entries.items() if name not in _NAMES}
    for end, entry in earlier.items():
        _check_earlier(source, end, entry.shape, entries)
    q, k, v = (_read(source, name, entries[name]) for name in _NAMES)
    queries = {end: _read(source, f"q_{end}", entry) for end, entry in sorted(earlier.items())}
    return Sample(q, k, v, source.stem, MappingProxyType(metadata), MappingProxyType(queries))


def _check_shapes(source: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        if len(shape) != len(_AXES[name]) or 0 in shape:
            raise UsageError(
                f"input {source}: tensor {name!r} has shape {list(shape)}; "
                f"({', '.join(_AXES[name])}) is needed, every size at least 1"
            )
    if shapes["k"] != shapes["v"]:
        raise UsageError(f"input {source}: 'k' is {list(shapes['k'])} and 'v' is {list(shapes['v'])}: give both one shape")
    (layers, query_heads, queries, head_dim), (kv_layers, kv_heads, tokens, kv_head_dim) = shapes["q"], shapes["k"]
    for what, of_q, of_k in (("layers", layers, kv_layers), ("elements a head", head_dim, kv_head_dim)):
        if of_q != of_k:
            raise UsageError(f"input {source}: 'q' has {of_q} {what} and 'k' has {of_k}: give both the same number")
    try:
        AttentionShape(1, query_heads, kv_heads, head_dim)
    except UsageError as error:
        raise UsageError(f"input {source}: {error}") from error
    if not MIN_QUERIES <= queries <= tokens:
        raise UsageError(
            f"input {source}: 'q' has {queries} queries for {tokens} tokens: give from {MIN_QUERIES} queries up to one "
            "a token, of the last consecutive positions"
        )


def _check_earlier(source: Path, end: int, shape: tuple[int, ...], entries: Mapping[str, TensorEntry]) -> None:
    last, tokens = entries["q"].shape, entries["k"].shape[2]
    if len(shape) != len(last) or (*shape[:2], shape[3]) != (*last[:2], last[3]):
        raise UsageError(
            f"input {source}: 'q_{end}' is {list(shape)}: give it the shape of 'q' ({list(last)}) but for the queries"
        )
    if not MIN_QUERIES <= shape[2] <= end < tokens:
        raise UsageError(
            f"input {source}: 'q_{end}' has {shape[2]} queries and 'k' {tokens} tokens: give from {MIN_QUERIES} queries up to "
            f"{end}, of the last positions before token {end}, which is one of them"
        )


def _read(source: Path, name: str, entry: TensorEntry) -> Float32:
    with source.open("rb") as file:
        file.seek(entry.start)
        raw = file.read(entry.n_bytes)
    if entry.dtype == "BF16":
        values = from_bf16_bits(np.frombuffer(raw, "<u2"))
    else:
        values = np.frombuffer(raw, "<f2" if entry.dtype == "F16" else "<f4").astype(np.float32)
    array = values.reshape(entry.shape)
    if not np.isfinite(array).all():
        index = [int(i) for i in np.argwhere(~np.isfinite(array))[0]]
        raise UsageError(
            f"input {source}: tensor {name!r} holds {array[tuple(index)]} at {index} ({', '.join(_AXES[name[0]])}): "
            "only finite values are accepted; capture it again in a wider dtype"
        )
    return array


def _rms(array: Float32) -> float:
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64))))
