"""The script of methods at equal bytes: what it measures, what a further call adds, and what stops it."""

import json
import sys
from pathlib import Path

import pytest

from tests.helpers.tiny_models import tiny_gguf

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import frontier

from elastickv.evaluation import sessions

TEXT = " ".join(f"{number * number} words of a text" for number in range(120))


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.setattr(frontier, "DEFAULT_TOKENS", 1600)
    model, text = tiny_gguf(tmp_path / "Tiny-Model.Q4_0.gguf"), tmp_path / "held-out.txt"
    text.write_text(TEXT)
    settings = [str(model), "--contexts=900", f"--text={text}", "--scored=3", "--windows=2", f"--output={tmp_path}"]

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["frontier.py", *settings, *arguments])
        status = frontier.main()
        path = tmp_path / "frontier-tiny-model-900.json"
        return status, json.loads(path.read_text()) if path.exists() else None

    return run


def names(result):
    return [row["cache"] for row in result["rows"]]


def test_a_further_call_measures_what_the_file_lacks(call, tmp_path, capsys):
    status, first = call("--compress=4", "--parts=4", "--formats=q4_0", "--selections=none", "--stored-bits=5")
    assert status == 0 and first["complete"]
    parts = ["C=4", "C=4 formats alone", "C=4 selection alone"]
    assert names(first) == [*parts, "stored_bits=5", "reference:stored_bits=5", "q4_0"]
    assert first["options"]["texts_sha256"].keys() == {"held-out.txt"} and first["calibration"]["text"] == "calibration.txt"
    assert (tmp_path / "calibration-tiny-model.json").exists() and str(tmp_path) not in json.dumps(first)
    capsys.readouterr()
    status, second = call("--compress=4", "--parts=4", "--formats=q4_0,int4", "--selections=streaming_llm")
    assert status == 0 and names(second) == [*names(first), "int4", "streaming_llm C=4"]
    assert second["rows"][:6] == first["rows"]
    said = capsys.readouterr().out
    assert "900 int4: KL" in said and "q4_0: KL" not in said and "calibrated in" not in said
    status, third = call("--compress=4", "--formats=none", "--selections=none", "--scored=4")
    assert names(third)[:1] == ["C=4"] and third["options"]["scored"] == 4, "other windows are measured anew"


def test_published_formats_that_were_rounded_first_are_measured_anew(call, tmp_path, capsys):
    settings = ("--compress=none", "--parts=none", "--selections=none")
    _, first = call(*settings, "--formats=q4_0,int8,kivi2")
    for row in first["rows"]:
        del row["stored_format"]["exact_dtype"]
    (tmp_path / "frontier-tiny-model-900.json").write_text(json.dumps(first))
    capsys.readouterr()
    _, second = call(*settings, "--formats=q4_0,int8,reference:int8")
    assert names(second) == ["int8", "kivi2", "q4_0", "reference:int8"]
    dtypes = {row["cache"]: row["stored_format"].get("exact_dtype") for row in second["rows"]}
    assert dtypes == {"int8": None, "kivi2": None, "q4_0": "fp32", "reference:int8": "fp32"}
    assert "measured anew without a rounding to bfloat16 before: q4_0\n" in capsys.readouterr().out


def test_our_references_are_recipes_that_need_no_kernel():
    assert frontier.parse_formats(frontier.REFERENCES) == frontier.REFERENCES
    assert not set(frontier.REFERENCES) & {*frontier.OWN, *frontier.PUBLISHED}


def test_a_method_that_fails_leaves_the_others(call, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no\nroom")

    monkeypatch.setattr(sessions, "published", refuse)
    status, result = call("--compress=4", "--parts=none", "--formats=int8,q4_0", "--selections=none")
    assert status == 0 and names(result) == ["C=4", "int8"]
    assert any(line.startswith("q4_0 failed: RuntimeError: no") for line in result["skipped"])


def test_the_rows_before_the_time_is_over_stay(call, monkeypatch):
    monkeypatch.setattr(frontier.Measurement, "note", lambda self, result: (self._write(result), setattr(LIMITS[0], "end", 0)))
    LIMITS.clear()
    made = frontier.Limit
    monkeypatch.setattr(frontier, "Limit", lambda seconds: LIMITS.append(made(seconds)) or LIMITS[0])
    status, result = call("--compress=4", "--parts=none", "--formats=int8,q4_0", "--selections=none")
    assert status == 1 and names(result) == ["C=4"] and not result["complete"]


LIMITS = []
