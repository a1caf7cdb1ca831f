"""The errors of each KV head of a model that `elastickv calibrate` measures, and the file that stores them.

The file stores errors, not recipes: `layer_solver` turns them into recipes for any ratio and context. It is JSON, so that
reading it runs no code.
"""

import base64
import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from elastickv.errors import UsageError
from elastickv.inputs import file_path, parse_json, read_text
from elastickv.recipe.shape import padded_head_dim

FORMAT = "elastickv-calibration"
VERSION = 1
MOST_SENSITIVITY = 1e30  # losses weighed by it are added up over layers
MOST_SMOOTHING = 12  # 16-bit floats have room for 2^12 times the largest keys that are known
_LATER = ("prefix", "smoothing", "sensitivity", "hessians")  # which older files lack
ROTATED = "+rotated"  # behind the name of a format: of tensors that are stored rotated
GPTQ = "+gptq"  # likewise, behind that: of tensors that are rounded by Hessians
SENSITIVITY_FORMATS: Mapping[str, str] = {
    "keys": "int4",
    "values": "int4",
    "keys/int2": "int2",
    "values/int2": "int2",
    **{f"{tensor}/{name}": name for tensor in ("keys", "values") for name in (f"int4{ROTATED}{GPTQ}", f"int2{ROTATED}{GPTQ}")},
}
"""Name of a sensitivity of keys or of values -> the format in which they are stored where it is measured; fine ones first."""
_ERRORS_OF = r"[a-z0-9_]+(/[1-9][0-9]{0,3})?(\+rotated)?(\+gptq)?"  # keys of `keys` and `values`
FRACTIONS: tuple[float, ...] = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)

HeadErrors = tuple[tuple[float, ...], ...]
"""[layer][KV head] -> error."""
Smoothing = tuple[tuple[int, ...], ...]
"""[KV head][channel] -> n, of factors 2^n, of one layer."""
_Point: TypeAlias = tuple[Sequence[float], Sequence[float]]  # errors and sensitivities, by layer
HessianTexts = tuple[str, ...]
"""[KV head] -> a Hessian as `kvcache.gptq.hessian_text` writes it, of one layer's K or V."""


@dataclass(frozen=True)
class StorageStatistics:
    """What a calibration says of how the tokens of one layer are stored. Each is None where it says nothing.

    Attributes
    ----------
    smoothing : of keys that are rotated.
    key_hessians, value_hessians : of `rounding=gptq`.
    """

    smoothing: Smoothing | None = None
    key_hessians: HessianTexts | None = None
    value_hessians: HessianTexts | None = None

    def of_heads(self, first: int, count: int) -> "StorageStatistics":
        """Return those of `count` KV heads from number `first` on."""
        heads = slice(first, first + count)
        smoothing, keys, values = self.smoothing, self.key_hessians, self.value_hessians
        return StorageStatistics(
            None if smoothing is None else smoothing[heads],
            None if keys is None else keys[heads],
            None if values is None else values[heads],
        )


@dataclass(frozen=True)
class ModelCalibration:
    """Errors of one model, each the mean over queries of ||W_o change of the head's output||^2 / ||residual||^2.

    The change is that of all query heads of a KV head together; the residual is the layer's input. The errors of keys, values
    and selection are measured separately and taken as independent: they add up.

    Attributes
    ----------
    model : the model's name, for people.
    fingerprint : of configuration and weights; identifies the model.
    layers : numbers of the layers measured, ascending; those with a sliding window have no errors.
    query_heads, kv_heads, head_dim : of each of these layers.
    text, tokens, queries : the text, its tokens that were read, and the positions that were scored.
    pages : anchor_every -> fraction of the cold pages that is read -> errors.
    keys : format of K -> errors of storing cold keys in it; 'int4+rotated' of keys that are rotated before, 'int4+gptq' and
        'int4+rotated+gptq' of keys that are rounded by Hessians. Older files lack them.
    values : format of V, of 4 bits and fewer with its group as 'int4/32' -> errors of storing cold values in it;
        'int4/32+rotated' likewise.
    prefix : the special tokens before every window of the text; None in older files, whose windows had none.
    smoothing : [layer][KV head][channel] -> n: where K is rotated, its channels are multiplied by 2^n before, and those of the
        queries by 2^-n. None in older files: all are 0.
    sensitivity : 'keys', 'values' and 'pages' -> [layer] -> KL divergence of the model's predictions, in nats a token, for a
        unit of the layer's error, all heads together: of `int4`, and of an eighth of the pages; 'keys/int2' is that of `int2`,
        'keys/int4+rotated+gptq' of what is rounded by Hessians (`SENSITIVITY_FORMATS`). None in older files and of 16-bit
        models; some older files have 'keys' and 'values' only.
    hessians : 'keys' and 'values' -> [layer][KV head] -> the cost of an error e of a key or value, e H e^T, as text. None in
        older files.
    """

    model: str
    fingerprint: str
    layers: tuple[int, ...]
    query_heads: int
    kv_heads: int
    head_dim: int
    text: str
    tokens: int
    queries: int
    pages: Mapping[int, Mapping[float, HeadErrors]]
    keys: Mapping[str, HeadErrors]
    values: Mapping[str, HeadErrors]
    prefix: tuple[int, ...] | None = None
    smoothing: tuple[Smoothing, ...] | None = None
    sensitivity: Mapping[str, tuple[float, ...]] | None = None
    hessians: Mapping[str, tuple[HessianTexts, ...]] | None = None

    def in_nats(self) -> "ModelCalibration":
        """Return this calibration with its errors as losses of the model's predictions, comparable between layers.

        Each is multiplied by its layer's sensitivity. A loss grows faster than its error in some layers: between the errors of
        `int4` and `int2` the sensitivity is a power of the error through those of both. What Hessians leave of an error lies in
        other directions, so it has sensitivities of its own where they were measured. A calibration without sensitivities is
        returned as it is, and errors of pages are left as they are where their sensitivities were not measured.
        """
        if self.sensitivity is None:
            return self
        weighed: dict[str, Any] = {"sensitivity": None}
        for tensor in ("keys", "values"):
            # Where the errors of `int4` were left out of a calibration, its sensitivity holds for all errors.
            nearest = self._points(tensor, by_hessians=False) or [([0.0] * len(self.layers), self.sensitivity[tensor])]
            by_hessians = self._points(tensor, by_hessians=True) or nearest
            weighed[tensor] = {
                name: _in_nats(rows, by_hessians if name.endswith(GPTQ) else nearest)
                for name, rows in getattr(self, tensor).items()
            }
        if "pages" in self.sensitivity:
            of_pages = self.sensitivity["pages"]
            weighed["pages"] = {
                steps: {fraction: _times(rows, of_pages) for fraction, rows in curve.items()}
                for steps, curve in self.pages.items()
            }
        return replace(self, **weighed)

    def _points(self, tensor: str, by_hessians: bool) -> list[_Point]:
        """Return the measured sensitivities of K or of V and the errors that they are of, small errors first."""
        points = list[_Point]()
        sensitivity, table = self.sensitivity or {}, getattr(self, tensor)
        for name in SENSITIVITY_FORMATS:
            if name in sensitivity and name.partition("/")[0] == tensor and name.endswith(GPTQ) == by_hessians:
                measured_as = sensitivity_errors(name, self.head_dim)
                if measured_as in table:
                    points.append(([float(sum(row)) for row in table[measured_as]], sensitivity[name]))
        return points

    def smoothing_of(self, layer: int) -> Smoothing | None:
        """Return the smoothing of one of `layers`, or None for none."""
        if self.smoothing is None or layer not in self.layers:
            return None
        return self.smoothing[self.layers.index(layer)]

    def statistics_of(self, layer: int) -> StorageStatistics:
        """Return what is known of one layer; nothing if it is none of `layers`."""
        if layer not in self.layers:
            return StorageStatistics()
        if self.hessians is None:
            return StorageStatistics(self.smoothing_of(layer))
        keys, values = (self.hessians[tensor][self.layers.index(layer)] for tensor in ("keys", "values"))
        return StorageStatistics(self.smoothing_of(layer), keys, values)

    def check_model(self, fingerprint: str, name: str = "this model") -> None:
        """Refuse to be used with another model.

        Raises
        ------
        UsageError : if `fingerprint` is not the calibration's.
        """
        if fingerprint != self.fingerprint:
            raise UsageError(
                f"the calibration is of {self.model} (fingerprint {self.fingerprint}), not of {name} ({fingerprint}): "
                f"run `elastickv calibrate` on {name}"
            )

    def dumps(self) -> str:
        """Return the file's text."""
        record = {name: value for name, value in asdict(self).items() if name not in _LATER or value is not None}
        text = json.dumps({"format": FORMAT, "version": VERSION} | record, indent=1)
        # A row of numbers a line.
        return re.sub(r"\[[^][]*\]", lambda row: "[" + ", ".join(row[0][1:-1].replace(",", " ").split()) + "]", text) + "\n"

    @classmethod
    def loads(cls, text: str, name: str = "the calibration") -> "ModelCalibration":
        """Return the calibration that a file's text holds.

        Raises
        ------
        UsageError : if it is no calibration, of another version, or does not hold together.
        """
        try:
            record = parse_json(text)
        except ValueError as error:
            raise UsageError(f"{name} is no calibration: not JSON ({error}); write one with `elastickv calibrate`") from None
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise UsageError(f"{name} is no calibration: no format {FORMAT!r}; write one with `elastickv calibrate`")
        if record.get("version") != VERSION:
            raise UsageError(
                f"{name} is a calibration of version {record.get('version')!r}, and this elastickv reads version {VERSION}: "
                "run `elastickv calibrate` again"
            )
        try:
            return cls._from(record)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise UsageError(f"{name} is damaged ({error}): run `elastickv calibrate` again") from None

    @classmethod
    def load(cls, path: Path | str) -> "ModelCalibration":
        """Read a calibration file.

        Raises
        ------
        UsageError : if it cannot be read, or `loads` refuses it.
        """
        text = read_text(file_path(path), f"calibration {path}", "give a file that `elastickv calibrate` wrote")
        return cls.loads(text, str(path))

    @classmethod
    def _from(cls, record: dict[str, Any]) -> "ModelCalibration":
        layers = tuple(int(layer) for layer in record["layers"])
        heads = int(record["kv_heads"])

        def errors(rows: Any) -> HeadErrors:
            table = tuple(tuple(float(error) for error in row) for row in rows)
            if len(table) != len(layers) or any(len(row) != heads for row in table):
                raise ValueError(f"{len(layers)} layers of {heads} KV heads are needed")
            if not all(error >= 0 and math.isfinite(error) for row in table for error in row):
                raise ValueError("an error that is negative or not finite")
            return table

        def smoothing(rows: Any) -> tuple[Smoothing, ...]:
            table = tuple(tuple(tuple(head) for head in layer) for layer in rows)
            if not all(isinstance(n, int) for layer in table for head in layer for n in head):
                raise ValueError("a smoothing that is not a whole number")
            sizes = {(len(layer), *map(len, layer)) for layer in table}
            if len(table) != len(layers) or sizes != {(heads, *[int(record["head_dim"])] * heads)}:
                raise ValueError(f"smoothing of {len(layers)} layers of {heads} KV heads is needed, a number a channel")
            if any(abs(n) > MOST_SMOOTHING for layer in table for head in layer for n in head):
                raise ValueError(f"smoothing beyond {MOST_SMOOTHING}")
            return table

        def sensitivity(factors: Any) -> tuple[float, ...]:
            row = tuple(factors) if isinstance(factors, list) else ()
            numbers = all(isinstance(factor, int | float) and not isinstance(factor, bool) for factor in row)
            if len(row) != len(layers) or not numbers or not all(0 <= factor <= MOST_SENSITIVITY for factor in row):
                raise ValueError(f"sensitivities of {len(layers)} layers are needed, from 0 to {MOST_SENSITIVITY:g}")
            return tuple(map(float, row))

        def hessians(rows: Any) -> tuple[HessianTexts, ...]:
            table = tuple(tuple(layer) for layer in rows)
            if len(table) != len(layers) or any(len(layer) != heads for layer in table):
                raise ValueError(f"Hessians of {len(layers)} layers of {heads} KV heads are needed")
            for layer in table:
                for text in layer:
                    check_hessian_text(text, int(record["head_dim"]))
            return table

        pages = {int(r): {float(f): errors(rows) for f, rows in curve.items()} for r, curve in record["pages"].items()}
        if not layers or not pages or any(1.0 not in curve or len(curve) < 2 for curve in pages.values()):
            raise ValueError("errors at fraction 1 and another are needed")
        if not record["keys"] or not record["values"]:
            raise ValueError("errors of formats are needed")
        stored = padded_head_dim(int(record["head_dim"]))
        for name in (*record["keys"], *record["values"]):
            if re.fullmatch(_ERRORS_OF, name) is None:
                raise ValueError(f"errors of {name!r}, which names no format")
            if (group := re.search("/([0-9]+)", name)) and stored % int(group[1]):
                raise ValueError(f"errors of {name!r}, which is no group of the {stored} channels that are stored")
        if any(not 0 < fraction <= 1 for curve in pages.values() for fraction in curve):
            raise ValueError("a fraction that is not above 0 and at most 1")
        return cls(
            model=str(record["model"]),
            fingerprint=str(record["fingerprint"]),
            text=str(record["text"]),
            query_heads=int(record["query_heads"]),
            head_dim=int(record["head_dim"]),
            tokens=int(record["tokens"]),
            queries=int(record["queries"]),
            layers=layers,
            kv_heads=heads,
            pages=pages,
            keys={str(name): errors(rows) for name, rows in record["keys"].items()},
            values={str(name): errors(rows) for name, rows in record["values"].items()},
            prefix=None if record.get("prefix") is None else tuple(int(token) for token in record["prefix"]),
            smoothing=None if record.get("smoothing") is None else smoothing(record["smoothing"]),
            sensitivity=None
            if record.get("sensitivity") is None
            else {
                tensor: sensitivity(record["sensitivity"][tensor])
                for tensor in (*SENSITIVITY_FORMATS, "pages")
                if tensor in ("keys", "values") or tensor in record["sensitivity"]
            },
            hessians=None
            if record.get("hessians") is None
            else {tensor: hessians(record["hessians"][tensor]) for tensor in ("keys", "values")},
        )


def sensitivity_errors(name: str, head_dim: int) -> str:
    """Return what `keys` or `values` call the errors that a sensitivity is of: 'values/int2' is of 'int2/64'.

    Parameters
    ----------
    name : one of `SENSITIVITY_FORMATS`.
    head_dim : of the model; the values of a token share one scale.
    """
    bits, mark, rest = SENSITIVITY_FORMATS[name].partition(ROTATED)
    return bits + (f"/{padded_head_dim(head_dim)}" if name.startswith("values") else "") + mark + rest


def _in_nats(errors: HeadErrors, points: Sequence[_Point]) -> HeadErrors:
    """Return errors times their layers' sensitivities.

    Parameters
    ----------
    points : one or two pairs of the layers' errors, all heads together, and the sensitivities at these errors.
    """
    factors = [
        _sensitivity_at(sum(row), [(at[layer], factor[layer]) for at, factor in points]) for layer, row in enumerate(errors)
    ]
    return _times(errors, factors)


def _sensitivity_at(error: float, points: Sequence[tuple[float, float]]) -> float:
    """Return a sensitivity at an error: that of the nearest point, between two points a power of the error through both."""
    (low, first), (high, second) = points[0], points[-1]
    if error <= low or not low < high or not 0 < first < second:
        return first
    exponent = math.log(second / first) / math.log(high / low)
    return float(first * (min(error, high) / low) ** exponent)


def _times(errors: HeadErrors, factors: Sequence[float]) -> HeadErrors:
    """Return errors with those of each layer times its factor."""
    return tuple(tuple(error * factor for error in row) for row, factor in zip(errors, factors, strict=True))


def check_hessian_text(text: Any, head_dim: int) -> None:
    """Check the text of one Hessian; see `kvcache.gptq.hessian_text`.

    Raises
    ------
    ValueError : if it is of another size, or its diagonal has a number that is negative or not finite.
    """
    content = base64.b64decode(text, validate=True)
    if len(content) != 4 * head_dim + head_dim * (head_dim - 1):
        raise ValueError(f"a Hessian of {len(content)} bytes for heads of {head_dim} channels")
    diagonal = struct.unpack(f"<{head_dim}f", content[: 4 * head_dim])
    if not all(number >= 0 and math.isfinite(number) for number in diagonal):
        raise ValueError("a Hessian whose diagonal has a number that is negative or not finite")
