"""`elastickv baseline`: what it prints and writes, and that other commands read it."""

import json

import jsonschema
import pytest

from elastickv.model_benchmark.baseline_result import SCHEMA_PATH
from elastickv.results.compare.result_sets import read_result_set
from tests.helpers.tiny_models import tiny_gguf

SIZES = ("--context", 200, "--reps", 3, "--decode-tokens", 2, "--scored", 3)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    pytest.importorskip("xllamacpp")
    return tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_transformers_gives_the_file_of_bench_model_with_its_price(elastickv, folder, tmp_path):
    output = tmp_path / "t.json"
    done = elastickv("baseline", "transformers", folder, *SIZES, "--recipe", "int4", "--device", "cpu", "-o", output)
    assert done.returncode == 0, done.stderr
    assert "elastic / stock" in done.stdout and "KL mean" in done.stdout
    result = json.loads(output.read_text())
    jsonschema.validate(result, json.loads(SCHEMA_PATH.read_text()))
    assert result["fidelity"]["kl_mean"] > 0 and result["fidelity"]["context"] == 200
    [run] = read_result_set(output, "A").runs
    assert run.fidelity.measured_on == "KL of elastic to stock, 3 tokens of morris.txt after 200"
    assert run.fidelity.mean == result["fidelity"]["kl_mean"]
    again = elastickv("compare", output, output, "--format", "json")
    assert again.returncode == 0 and [row["figure"] for row in json.loads(again.stdout)["rows"]] == ["token"]


def test_a_recipe_that_changes_nothing_costs_nothing(elastickv, folder):
    done = elastickv("baseline", "transformers", folder, *SIZES, "--compress", 1, "--device", "cpu", "--json")
    price = json.loads(done.stdout)["fidelity"]
    assert price["kl_max"] < 1e-6 and price["top1_percent"] == 100


def test_random_weights_have_no_price_and_the_file_says_why(elastickv):
    done = elastickv("baseline", "transformers", "shape:tiny", *SIZES, "--compress", 1, "--device", "cpu", "--json")
    result = json.loads(done.stdout)
    assert result["fidelity"] is None and "random weights" in result["fidelity_not_measured"]
    jsonschema.validate(result, json.loads(SCHEMA_PATH.read_text()))


def test_gguf_shows_types_and_our_formats_and_can_be_compared(elastickv, gguf_file, tmp_path):
    files = [tmp_path / name for name in ("a.json", "b.json")]
    for file in files:
        done = elastickv("baseline", "gguf", gguf_file, *SIZES, "--threads", 1, "-o", file)
        assert done.returncode == 0, done.stderr
    for said in ("q8_0", "tokens/s, prompt", "KV bytes a token", "our formats", "int4", "KL to f16", "q4_0 / f16"):
        assert said in done.stdout
    compared = elastickv("compare", *files, "--format", "json")
    assert compared.returncode == 0, compared.stderr
    rows = {row["figure"]: row for row in json.loads(compared.stdout)["rows"]}
    assert set(rows) == {f"{what}, {name}" for what in ("token", "prompt token") for name in ("f16", "q8_0", "q4_0")}
    assert rows["token, q4_0"]["control"] == "f16" and rows["token, f16"]["control"] is None
    assert rows["token, q4_0"]["fidelity"]["verdict"] == "SAME"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("gguf", "nope.gguf"), "does not exist"),
        (("gguf", "nope.gguf", "--format", "xml"), "table, json"),
        (("transformers", "./nope"), "does not exist"),
        (("transformers", "shape:tiny", "--scored", -1), "--scored=-1"),
        (("transformers", "shape:tiny", "--reps", 1), "--reps=1"),
        (("transformers", "shape:tiny", "--device", "tpu"), "--device=tpu"),
        (("transformers", "shape:tiny", "-o", "/nowhere/x.json"), "does not exist"),
        (("transformers",), "MODEL"),
        (("onnx", "x"), "onnx"),
    ],
)
def test_bad_input_is_one_line(elastickv, arguments, said):
    done = elastickv("baseline", *arguments)
    assert done.returncode == 2 and not done.stdout
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(lines) == 1 and said in lines[0] and "Traceback" not in done.stderr


def test_two_samples_make_no_interval_and_the_table_says_so(elastickv, gguf_file, tmp_path):
    output = tmp_path / "two.json"
    sizes = ("--context", 64, "--reps", 2, "--decode-tokens", 1, "--scored", 0)
    done = elastickv("baseline", "gguf", gguf_file, *sizes, "--threads", 1, "-o", output)
    assert done.returncode == 0, done.stderr
    assert ".." not in done.stdout and "[" not in done.stdout
    assert "times as fast, no interval: fewer than 3 pairs" in done.stdout
    assert "tokens/s: no interval: fewer than 3 pairs" in done.stdout
    result = json.loads(output.read_text())
    jsonschema.validate(result, json.loads(SCHEMA_PATH.read_text()))
    assert set(result["speedups"].values()) == {None} and result["noise_floor"] is None
    assert {(cache["step_ms"], cache["prompt_ms"]) for cache in result["caches"]} == {(None, None)}
    rows = json.loads(elastickv("compare", output, output, "--format", "json").stdout)["rows"]
    assert {row["ratio"] for row in rows} == {None}
    assert {row["why"] for row in rows} == {"fewer than 3 samples of a side"}
