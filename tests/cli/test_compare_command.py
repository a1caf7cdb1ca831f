"""`elastickv compare` as a shell sees it."""

import json
import random

import pytest

from tests.helpers.results import ORIGINAL, quiet, result, write


@pytest.fixture
def files(tmp_path):
    def made(file, elastic_ms, seed, **more):
        return write(tmp_path, file, result(quiet(elastic_ms, seed), quiet(1.0, seed + 1), **more))

    return {
        "a": made("a.json", 0.6, 1),
        "same": made("same.json", 0.6, 3),
        "slower": made("slower.json", 0.66, 5),
        "worse": made("worse.json", 0.6, 7, recipe_error=0.5),
        "vague": write(tmp_path, "vague.json", result(random.Random(1).sample([0.3, 1.3] * 10, 20), quiet(1.0, 3, 20))),
        "elsewhere": made("elsewhere.json", 0.6, 9, name="Another"),
        "original": write(tmp_path, "original.json", ORIGINAL),
    }


@pytest.mark.parametrize(
    ("b", "fail_on", "code"),
    [
        ("same", "any", 0), ("slower", "slower", 1), ("slower", "fidelity", 0), ("slower", "any", 1), ("worse", "fidelity", 1),
        ("worse", "slower", 0), ("vague", "slower", 3), ("vague", "any", 3), ("slower", None, 0), ("vague", None, 0),
        ("elsewhere", None, 2), ("elsewhere", "any", 2),
    ],
)  # fmt: skip
def test_exit_codes(elastickv, files, b, fail_on, code):
    done = elastickv("compare", files["a"], files[b], *([] if fail_on is None else ["--fail-on", fail_on]))
    assert done.returncode == code, done.stderr
    if fail_on is not None and code != 2:
        assert done.stderr.splitlines()[-1].startswith(f"elastickv: --fail-on {fail_on}: ")


def test_the_table_says_verdict_interval_and_error(elastickv, files):
    shown = elastickv("compare", files["a"], files["slower"]).stdout
    assert "SLOWER" in shown
    assert "1.10" in shown
    assert "1 SLOWER (margin 3 %" in shown


def test_json_alone_on_stdout_and_a_copy_in_a_file(elastickv, files, tmp_path):
    target = tmp_path / "out.csv"
    done = elastickv("compare", files["a"], files["slower"], "--format=json", "-o", target)
    assert json.loads(done.stdout)["counts"]["SLOWER"] == 1
    assert target.read_text().count("SLOWER") == 1


def test_a_wider_margin_makes_it_the_same(elastickv, files):
    done = elastickv("compare", files["a"], files["slower"], "--margin=15", "--fail-on=slower")
    assert done.returncode == 0
    assert "1 SAME" in done.stdout


def test_an_allowed_other_device_is_warned_of(elastickv, files):
    done = elastickv("compare", files["a"], files["elsewhere"], "--allow-different-device", "--format=json")
    assert done.returncode == 0
    assert "warning: different devices" in done.stderr


def test_the_original_programs_json(elastickv, files):
    done = elastickv("compare", files["original"], files["original"], "--fail-on=slower")
    assert done.returncode == 0, done.stderr
    assert "no softmax" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["a"], "Missing argument"),
        (["a", "/no/such"], "/no/such does not exist"),
        (["a", "same", "--fail-on=faster"], "slower, fidelity, any"),
        (["a", "same", "--format=xml"], "table, json"),
        (["a", "same", "--margin=-1"], "margin"),
        (["a", "same", "--margin=much"], "much"),
        (["a", "same", "--control=peer"], "dense, none"),
        (["a", "same", "--output=/no/such/folder/x.json"], "does not exist"),
        (["a", "elsewhere"], "--allow-different-device"),
        (["a", "same", "extra"], "extra"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(elastickv, files, arguments, named):
    done = elastickv("compare", *(files.get(argument, argument) for argument in arguments))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert named in done.stderr
