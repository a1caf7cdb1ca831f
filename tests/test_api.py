"""`elastickv.bench` and `elastickv.load`: the command's options, a value that shows and saves itself."""

import copy
import json
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import elastickv
from elastickv.benchmark import Options
from elastickv.benchmark.options import TYPES
from elastickv.cli.bench import command
from elastickv.errors import UsageError
from elastickv.results.formats import FORMATS
from elastickv.results.measurement import Measurement
from tests.helpers.reference_backend import ReferenceBackend, measure_with
from tests.helpers.results import ORIGINAL, result

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
MODEL = RESULTS / "h100" / "model-8b-4096x1.json"
SMALL = {"seq": 340, "heads": 2, "dim": 64, "reps": 6, "warmup": 1, "inner_loops": 2, "cache": "hot", "paired": True}


@pytest.fixture
def measured(monkeypatch):
    measure_with(monkeypatch, ReferenceBackend())
    return lambda **given: elastickv.bench(**SMALL | given)


def test_a_measurement_holds_shows_and_saves_what_the_command_does(measured, tmp_path):
    found = measured(compress=1.3, gate="speedup>=1.1", seed=np.int64(3))
    assert found["configuration"]["seed"] == 3 and found["speedup"]["estimate"] > 1.1
    assert found.outcome == "pass" and found.complete
    plain = found.as_dict()
    assert json.loads(found.to_json()) == plain and dict(found) == plain and len(found) == len(plain)
    assert str(found) == FORMATS["table"](found.result) and repr(found).startswith("<Measurement: ")
    (row,) = found.rows()
    assert row["speedup"] == found["speedup"]["estimate"] and row["seq"] == 340
    for suffix, name in ((".json", "json"), (".csv", "csv"), (".md", "md"), (".html", "html"), (".txt", "table")):
        found.save(tmp_path / f"r{suffix}")
        assert (tmp_path / f"r{suffix}").read_text() == FORMATS[name](found.result)
    again = elastickv.load(tmp_path / "r.json")
    assert isinstance(again, Measurement) and again == found
    assert {row.verdict for row in elastickv.compare(found, again).rows} == {"SAME"}
    with pytest.raises(UsageError, match="cannot be written"):
        found.save(tmp_path / "no" / "r.json")


def test_a_preset_gives_way_to_what_is_given_beside_it(monkeypatch):
    import elastickv.api as api

    asked = []
    template = result()
    monkeypatch.setattr(api, "run", lambda options, *_: asked.append(options) or SimpleNamespace(as_dict=lambda: template))
    elastickv.bench(preset="long", seq=2048, kv_heads=None)
    assert asked == [Options(seq=2048, heads=32, dim=128, compress=4)]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"sequence": 5}, "`sequence` is unknown"),
        ({"command_": 5}, "`command_` is unknown"),
        ({"seq": "many"}, "`seq`=many is not a whole number"),
        ({"seq": 1024.5}, "`seq`=1024.5 is not a whole number"),
        ({"seq": True}, "`seq`=True"),
        ({"paired": 1}, "`paired`=1 is not true or false"),
        ({"compress": float("nan")}, "`compress`=nan"),
        ({"recipe": 4}, "`recipe`=4 is not a text"),
        ({"recipe": "int5"}, "int5"),
        ({"preset": "medium"}, "long, short"),
        ({"gate": "silver"}, "golden"),
        ({"calibration": "x.json"}, "`model`"),
        ({"temperature": 0.5}, "`model`"),
        ({"model": "shape:tiny", "heads": 2}, "`heads` says nothing about a model"),
        ({"model": "shape:tiny", "gate": "golden"}, "`gate` says nothing about a model"),
        ({"model": "shape:tiny", "backend": "tpu"}, "auto, cuda, cpu"),
        ({"model": "shape:9b"}, "shape:8b"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(given, named):
    with pytest.raises(UsageError, match=named):
        elastickv.bench(**given)


def test_every_option_of_the_function_is_one_of_the_command_with_its_default_in_the_help():
    own = {"model", "preset", "gate", "calibration", "temperature"}
    only_typed = {"output", "format_", "json_"}
    parameters = {parameter.name: parameter for parameter in command.params}
    assert set(parameters) - own - only_typed == set(TYPES)
    assert set(command.make_context("bench", []).params.values()) == {None}
    for option in fields(Options):
        if option.name in TYPES and option.default is not None and TYPES[option.name] is not bool:
            shown = f"{option.default:g}" if TYPES[option.name] is float else str(option.default)
            assert f"[default: {shown}" in parameters[option.name].help, option.name


def test_defaults_with_a_model_are_in_the_help_of_the_command():
    shown = {parameter.name: parameter.help for parameter in command.params}
    assert "[default: 1024; 4096 with --model]" in shown["seq"] and "[default: 2; 4 with --model]" in shown["compress"]
    assert {"seq", "compress", "reps", "decode_tokens", "dtype"} == {name for name in TYPES if " with --model]" in shown[name]}


def test_the_solver_runs_once_for_each_context_and_shape_of_a_run(monkeypatch):
    from elastickv.benchmark import options

    solved, resolve = Counter(), options.resolve

    def counting(text, ratio, context, shape, *others):
        solved[context, shape] += 1
        return resolve(text, ratio, context, shape, *others)

    monkeypatch.setattr(options, "resolve", counting)
    measure_with(monkeypatch, ReferenceBackend())
    elastickv.bench(**SMALL | {"compress": 1.3})
    # The recipe that is timed is also the one whose error is measured on real activations.
    assert list(solved.values()) == [1]


def test_a_models_result_has_a_row_for_each_cache(tmp_path):
    found = elastickv.load(MODEL)
    rows = found.rows()
    assert [row["cache"] for row in rows] == ["stock", "stock static+compile", "elastic"]
    assert rows[0]["speedup_estimate"] == found["speedups"]["stock"]["estimate"] and rows[2]["speedup_estimate"] is None
    assert found.to_csv().count("\n") == 4 and found.to_markdown().count("\n") == 5
    assert "<th>elastic</th>" in found._repr_html_()
    found.save(tmp_path / "m.json")
    assert elastickv.load(tmp_path / "m.json") == found


def test_a_model_is_measured():
    found = elastickv.bench(model="shape:tiny", seq=300, reps=2, decode_tokens=2, compress=8, backend="cpu", dtype="fp32")
    assert [cache["cache"] for cache in found["caches"]] == ["stock", "elastic"]
    assert found["compress"] == 8 and "tokens/s" in str(found)


@pytest.mark.parametrize("kind", ["step", "model"])
def test_html_is_escaped(kind):
    plain = copy.deepcopy(result() if kind == "step" else dict(elastickv.load(MODEL)))
    evil = "<script>alert(1)</script>"
    if kind == "step":
        plain["gpu"]["name"] = plain["recipe"]["text"] = plain["warnings"][0:1] = plain["contenders"][0]["name"] = evil
    else:
        plain["model"]["name"] = plain["caches"][0]["cache"] = evil
    assert evil not in Measurement(plain)._repr_html_() and "&lt;script&gt;" in Measurement(plain)._repr_html_()


def test_a_data_frame_has_the_rows(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=list))
    assert Measurement(result()).to_pandas() == Measurement(result()).rows()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match="pip install pandas"):
        Measurement(result()).to_pandas()


def damaged(**changes):
    return {name: value for name, value in (result() | changes).items() if value is not ...}


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("x.json", "{", "is no JSON"),
        ("x.json", "", "is empty"),
        ("x.json", "[]", "no result"),
        ("x.json", json.dumps({"kind": "elastickv-comparison"}), "no result"),
        ("x.json", json.dumps(ORIGINAL), "no result of `elastickv bench`"),
        ("x.json", json.dumps(damaged(schema_version="2.0")), "schema 2.0"),
        ("x.json", json.dumps(damaged(contenders=...)), "contenders"),
        ("x.json", json.dumps(damaged(noise_floor={"estimate": 1})), "lacks noise_floor.low"),
        ("x.json", json.dumps(damaged(ceilings=5)), "has a int in ceilings"),
        ("x.jsonl", 2 * (json.dumps(result()) + "\n"), "holds 2 values"),
        ("x.jsonl", json.dumps(result()) + "\n{", "one cut off"),
        ("x.json", json.dumps({"sweep": {}}), "holds no cells"),
    ],
)
def test_a_file_that_holds_no_result_is_named(tmp_path, name, text, named):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UsageError, match=named) as refused:
        elastickv.load(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_a_folder_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(UsageError, match="is a folder"):
        elastickv.load(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        elastickv.load(tmp_path / "x.json")


def test_every_committed_result_loads_and_shows_itself():
    kinds = ('"benchmark_type"', '"elastickv-model-bench"')
    held = [path for path in RESULTS.glob("**/*.json") if any(kind in path.read_text(encoding="utf-8")[:200] for kind in kinds)]
    assert len(held) > 30
    for path in held:
        assert "<table>" in elastickv.load(path)._repr_html_(), path


def test_importing_a_function_needs_no_torch():
    code = "import sys, elastickv; elastickv.bench, elastickv.load; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: elastickv.load(5),
        lambda: elastickv.load(b"a.json"),
        lambda: elastickv.load("n" * 5000),
        lambda: elastickv.compare("a.json", "b.json", margin_percent="3"),
        lambda: elastickv.compare("a.json", "b.json", fidelity_margin_percent=None),
        lambda: elastickv.bench(gate=5),
        lambda: elastickv.bench(model=5),
    ],
)
def test_what_is_of_another_type_is_refused_in_one_line(call):
    with pytest.raises(UsageError):
        call()


def test_documented_names_of_former_versions_stay():
    from elastickv import benchmark, measure
    from elastickv.transformers import ElasticCache

    assert [getattr(measure, name) for name in measure.__all__] == [getattr(benchmark, name) for name in measure.__all__]
    assert ElasticCache.take_back is ElasticCache.rollback
