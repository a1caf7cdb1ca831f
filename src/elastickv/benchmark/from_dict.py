"""Dataclasses from JSON values, checked against the types of their fields. Errors name the file and the key."""

import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from elastickv.errors import UsageError

LEAST, LARGEST = 1e-30, 1e30  # of figures: their ratios and products are finite
LEAST_TIME, LONGEST_TIME = 1e-9, 1e9  # milliseconds or seconds: from less than a cycle to days
T = TypeVar("T")


@dataclass(frozen=True)
class Bounds:
    """The range of numbers that a field's type accepts, and of all numbers inside it unless they have bounds of their own."""

    low: float
    high: float


@dataclass(frozen=True)
class Keys:
    """Keys that a dictionary must hold."""

    names: tuple[str, ...]


FIGURES = Bounds(0.0, LARGEST)
POSITIVE = Bounds(LEAST, LARGEST)
SIGNED = Bounds(-LARGEST, LARGEST)
Positive = Annotated[float, POSITIVE]
Duration = Annotated[float, Bounds(LEAST_TIME, LONGEST_TIME)]
Count = Annotated[int, Bounds(1, LARGEST)]


def optional(group: str | None = None) -> dict[str, Any]:
    """Return the metadata of a field that some files lack: None there, and left out again by `to_dict`.

    Parameters
    ----------
    group : the field whose presence decides whether this one is written where it is None.
    """
    return {"optional": True, "group": group}


def from_dict(kind: type[T], value: Any, source: str) -> T:
    """Return JSON values as the dataclass `kind`.

    Keys that it has no field for are ignored: later versions may add some. A field with a default may be missing.

    Parameters
    ----------
    source : what error messages call the value: its file, and the line of it.

    Raises
    ------
    UsageError : naming `source` and the key that is missing, of another type or out of range.
    """
    if not isinstance(value, Mapping):
        raise refused(source, f"holds a {type(value).__name__}, where an object should be")
    converted: T = _FromDict(source).dataclass(kind, value, "", FIGURES)
    return converted


def to_dict(value: Any) -> Any:
    """Return a dataclass as JSON values, keys in the order of its fields."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_dict(getattr(value, item.name)) for item in fields(value) if not _absent(value, item)}
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    return [to_dict(item) for item in value] if isinstance(value, (list, tuple)) else value


def refused(source: str, what: str) -> UsageError:
    """Return the error that says what is wrong with a result."""
    return UsageError(f"{source} {what}: cut off, edited or not of this program; measure again")


def _absent(value: Any, item: Field[Any]) -> bool:
    if getattr(value, item.name) is not None or not item.metadata.get("optional"):
        return False
    group = item.metadata["group"]
    return group is None or getattr(value, group) is None


@cache
def _fields(kind: Any) -> tuple[tuple[Field[Any], Any], ...]:
    hints = get_type_hints(kind, include_extras=True)
    return tuple((item, hints[item.name]) for item in fields(kind))


class _FromDict:
    """Converts the values of one source."""

    def __init__(self, source: str) -> None:
        self._source = source

    def dataclass(self, kind: Any, value: Mapping[str, Any], path: str, bounds: Bounds) -> Any:
        converted = {}
        for item, hint in _fields(kind):
            at = f"{path}.{item.name}" if path else item.name
            if item.name in value:
                converted[item.name] = self._convert(hint, value[item.name], at, bounds)
            elif item.default is MISSING and item.default_factory is MISSING:
                raise refused(self._source, f"lacks {at}")
        return kind(**converted)

    def _convert(self, kind: Any, value: Any, path: str, bounds: Bounds, keys: tuple[str, ...] = ()) -> Any:
        if kind is Any:
            return value
        origin, arguments = get_origin(kind), get_args(kind)
        if origin is Annotated:
            own = next((mark for mark in arguments[1:] if isinstance(mark, Bounds)), bounds)
            names = next((mark.names for mark in arguments[1:] if isinstance(mark, Keys)), keys)
            return self._convert(arguments[0], value, path, own, names)
        if origin in (Union, types.UnionType):
            if value is None and type(None) in arguments:
                return None
            inner = [argument for argument in arguments if argument is not type(None)]
            return self._convert(float if set(inner) == {int, float} else inner[0], value, path, bounds, keys)
        if is_dataclass(kind):
            return self.dataclass(kind, self._typed(value, Mapping, "object", path), path, bounds)
        if origin is dict:
            return self._dictionary(arguments[1], value, path, bounds, keys)
        if origin in (list, tuple):
            return self._sequence(origin, arguments, value, path, bounds)
        if kind in (int, float):
            return self._number(kind, value, path, bounds)
        return self._typed(value, kind, {str: "text", bool: "boolean"}[kind], path)

    def _dictionary(self, kind: Any, value: Any, path: str, bounds: Bounds, keys: tuple[str, ...]) -> dict[str, Any]:
        items = self._typed(value, Mapping, "object", path)
        for name in keys:
            if name not in items:
                raise refused(self._source, f"lacks {path}.{name}")
        return {str(name): self._convert(kind, item, f"{path}.{name}", bounds) for name, item in items.items()}

    def _sequence(self, origin: Any, arguments: tuple[Any, ...], value: Any, path: str, bounds: Bounds) -> Any:
        items = self._typed(value, (list, tuple), "list", path)
        if origin is list or arguments[-1] is Ellipsis:
            return origin(self._convert(arguments[0], item, f"{path}[{i}]", bounds) for i, item in enumerate(items))
        if len(items) != len(arguments):
            raise refused(self._source, f"has {len(items)} values in {path}, where {len(arguments)} should be")
        return tuple(
            self._convert(kind, item, f"{path}[{i}]", bounds)
            for i, (kind, item) in enumerate(zip(arguments, items, strict=True))
        )

    def _number(self, kind: type, value: Any, path: str, bounds: Bounds) -> Any:
        # A comparison with NaN is false, and so NaN is refused.
        if type(value) not in (int, float) or not bounds.low <= value <= bounds.high:
            shown = f"{path} = {str(value)[:40]}"
            raise refused(self._source, f"has {shown}, which is no number from {bounds.low:g} to {bounds.high:g}")
        if kind is int and value != int(value):
            raise refused(self._source, f"has {value} in {path}, which is no whole number")
        return int(value) if kind is int else value

    def _typed(self, value: Any, kind: Any, name: str, path: str) -> Any:
        if not isinstance(value, kind):
            raise refused(self._source, f"has a {type(value).__name__} in {path}, where a {name} should be")
        return value
