"""A result survives being written and read: every committed file, and whatever values its fields may hold."""

import json
import types
from dataclasses import MISSING, fields, is_dataclass
from math import ceil
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from elastickv.benchmark import Result
from elastickv.benchmark.from_dict import FIGURES, Bounds, Keys, to_dict
from elastickv.errors import UsageError
from elastickv.results.kinds.evaluation_result import EvaluationResult, PassKeyRow
from elastickv.results.kinds.gguf_result import GgufBaseline
from elastickv.results.kinds.model_result import ModelBenchResult, TransformersBaseline
from elastickv.results.kinds.original_result import OriginalResult
from elastickv.results.kinds.serving_result import ServingResult
from elastickv.results.kinds.soak_result import SoakResult
from elastickv.results.load import KINDS, kind_of
from elastickv.results.measurement import Measurement
from tests.helpers.results import COMMITTED, GGUF, ORIGINAL, result
from tests.helpers.run_results import run_result

TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)
VERSIONS = {Result: {"schema_version": "1.0"}, OriginalResult: {}}


def values_of(kind, bounds=FIGURES, keys=()):
    """Return a strategy of values that a field of this type may hold."""
    if kind is Any:
        return st.one_of(st.none(), st.booleans(), TEXTS, st.lists(st.integers(0, 9), max_size=2))
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        bounds = next((mark for mark in arguments[1:] if isinstance(mark, Bounds)), bounds)
        keys = next((mark.names for mark in arguments[1:] if isinstance(mark, Keys)), keys)
        return values_of(arguments[0], bounds, keys)
    if origin in (Union, types.UnionType):
        return st.one_of([values_of(argument, bounds, keys) for argument in arguments])
    if is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        return st.builds(kind, **{field.name: values_of(hints[field.name], bounds) for field in fields(kind)})
    if origin is dict:
        inner = values_of(arguments[1], bounds)
        named = st.fixed_dictionaries(dict.fromkeys(keys, inner))
        return st.builds(lambda more, fixed: more | fixed, st.dictionaries(TEXTS, inner, max_size=1), named)
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        return st.lists(values_of(arguments[0], bounds), max_size=2).map(origin)
    if origin is tuple:
        return st.tuples(*(values_of(argument, bounds) for argument in arguments))
    whole = st.integers(max(ceil(bounds.low), -(2**40)), int(min(bounds.high, 2**40)))
    numbers = st.floats(bounds.low, bounds.high)
    return {type(None): st.none(), bool: st.booleans(), str: TEXTS, int: whole, float: numbers}[kind]


def of_this_version(kind, value):
    """Return a generated result with the version that this program writes."""
    plain = to_dict(value) | VERSIONS.get(kind, {"version": 1})
    if kind is EvaluationResult:
        plain["needle"] = [
            row | {"found": {cache: [True] * len(row["depths"]) for cache in row["found"]}} for row in plain["needle"]
        ]
        for task in plain["tasks"]:
            task |= {"items": 2, "caches": [cache | {"scores": [1.0, 0.0]} for cache in task["caches"]]}
    return plain


@pytest.mark.parametrize("kind", [kind.type for kind in KINDS], ids=lambda kind: kind.__name__)
def test_a_generated_result_is_read_as_it_was_written(kind):
    @settings(max_examples=25, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(values_of(kind))
    def holds(value):
        plain = json.loads(json.dumps(of_this_version(kind, value)))
        read = kind.from_dict(plain)
        assert to_dict(read) == plain
        assert kind.from_dict(to_dict(read)) == read

    holds()


def with_defaults(written, read, kind):
    """Return whether `read` is what was written, and where an older file lacks a field its default."""
    hints = get_type_hints(kind)
    for field in fields(kind):
        if field.name in written:
            inner = hints[field.name]
            one = next((a for a in (inner, *get_args(inner)) if is_dataclass(a)), None)
            if one is not None and isinstance(written[field.name], dict) and is_dataclass(inner if inner is one else one):
                if get_origin(inner) is not dict and not with_defaults(written[field.name], read[field.name], one):
                    return False
            elif written[field.name] != read[field.name]:
                return False
        elif field.name in read:
            default = field.default if field.default is not MISSING else field.default_factory()
            if read[field.name] != default:
                return False
    return set(written) <= set(read)


def committed():
    for path in sorted(COMMITTED.rglob("*.json")):
        value = json.loads(path.read_text(encoding="utf-8"))
        if kind_of(value) is not None:
            yield pytest.param(value, id=str(path.relative_to(COMMITTED)))


@pytest.mark.parametrize("value", list(committed()))
def test_every_committed_result_is_read_whole(value):
    kind = kind_of(value).type
    read = kind.from_dict(value)
    assert with_defaults(value, to_dict(read), kind)
    assert kind.from_dict(to_dict(read)) == read


def test_every_kind_is_committed_or_made_up_here():
    kinds = {kind_of(parameter.values[0]).type for parameter in committed()} | {kind_of(GGUF).type, kind_of(ORIGINAL).type}
    models = {TransformersBaseline, ModelBenchResult, GgufBaseline, EvaluationResult, ServingResult, SoakResult}
    assert kinds == {Result, OriginalResult} | models


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("recipe", "ratio_read"), 0, "recipe.ratio_read = 0, which is no number from 1e-30"),
        (("recipe", "ratio_read"), float("nan"), "recipe.ratio_read = nan"),
        (("recipe", "ratio_read"), True, "recipe.ratio_read = True"),
        (("contenders", 1, "name"), 3, "has a int in contenders[1].name, where a text should be"),
        (("fidelity", "sample", "context"), [1], "has 1 values in fidelity.sample.context, where 2 should be"),
        (("configuration", "batch"), 1.5, "has 1.5 in configuration.batch, which is no whole number"),
        (("complete",), "yes", "has a str in complete, where a boolean should be"),
        (("samples",), {"a\nb": ["x"]}, "lacks samples.elastic"),
        (("samples",), {"elastic": [1.0], "a\nb": ["x"]}, "samples.a b[0] = x"),
    ],
)
def test_an_error_names_the_key(path, value, said):
    made = result()
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(UsageError) as refused:
        Result.from_dict(made, "a.json")
    assert str(refused.value).startswith("a.json ") and said in str(refused.value) and "\n" not in str(refused.value)


def test_answers_that_are_not_one_a_depth_are_refused():
    with pytest.raises(UsageError, match="another number of pass keys than depths for full"):
        PassKeyRow(100, [0.0, 1.0], {"full": [True]}).check("a.json")


@pytest.mark.parametrize(
    "value", [json.loads((COMMITTED / "h100" / "model-8b-32768x1.json").read_text(encoding="utf-8")), GGUF, run_result()]
)
def test_a_result_without_caches_is_text_without_rows(value):
    measured = Measurement(value | {"caches": []})
    shown = {form: measured.shown(form) for form in ("table", "json", "jsonl", "csv", "md", "html")}
    assert measured.rows() == []
    assert shown["csv"] == shown["md"] == ""
    assert json.loads(shown["json"])["caches"] == []
    assert all(shown[form] for form in ("table", "html"))
