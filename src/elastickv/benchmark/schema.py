"""The JSON Schema of a result, derived from its dataclasses: a test keeps the committed file equal to it.

`python -m elastickv.benchmark.schema` rewrites that file.
"""

import json
import types
from dataclasses import MISSING, fields, is_dataclass
from inspect import getdoc
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from elastickv.benchmark.result import SCHEMA_VERSION, Result

SCHEMA_PATH = Path(__file__).with_name("result.schema.json")
_SCALARS: dict[Any, str] = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}


def result_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of `Result.as_dict()`."""
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"ElasticKV benchmark result {SCHEMA_VERSION}",
    }
    return head | schema_of(Result)


def schema_of(kind: Any) -> dict[str, Any]:
    """Return the schema of a dataclass, or of a type that one's field has.

    Raises
    ------
    TypeError : if it has no JSON form.
    """
    if kind is Any:
        return {}
    if kind in _SCALARS:
        return {"type": _SCALARS[kind]}
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return {
            "type": "object",
            "description": (getdoc(kind) or "").split("\n\n")[0].replace("\n", " "),
            "properties": {f.name: schema_of(hints[f.name]) for f in fields(kind)},
            # A field with a default came later: older files lack it.
            "required": [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING],
            "additionalProperties": False,
        }
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return {"anyOf": [schema_of(argument) for argument in arguments]}
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        return {"type": "array", "items": schema_of(arguments[0])}
    if origin is tuple:
        size = len(arguments)
        return {"type": "array", "prefixItems": [schema_of(a) for a in arguments], "minItems": size, "maxItems": size}
    if origin is dict:
        return {"type": "object", "additionalProperties": schema_of(arguments[1])}
    raise TypeError(f"{kind} has no JSON form")


if __name__ == "__main__":
    SCHEMA_PATH.write_text(json.dumps(result_schema(), indent=2) + "\n", encoding="utf-8")
