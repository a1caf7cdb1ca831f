"""Random schedules of requests: what a seed gives, and what is said of requests that differ from themselves alone."""

import importlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SEEDS = 40
LISTS = {(0, 200): [[0, 3], [0, 1]], (1, 203): [[0], [0]]}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("random_schedules")
    sys.modules.pop("random_schedules", None)


def run_of(script, **changes):
    logits, codes = np.zeros((3, 5)), [np.zeros((2, 4, 8), np.uint8)]
    return replace(script.Run([1, 2, 3], logits, codes, LISTS), **changes)


def test_schedules_have_all_that_is_asked_of_them(script):
    schedules = [script.Schedule.random(seed) for seed in range(SEEDS)]
    requests = [request for schedule in schedules for request in schedule.requests]
    assert {request.ratio for request in requests} == set(script.RATIOS)
    assert 0.05 < np.mean([request.aborts is not None for request in requests]) < 0.3
    assert all(request.aborts is None or request.aborts > request.arrives for request in requests)
    assert all(1 <= len(request.prompt) <= script.LONGEST_PROMPT and request.tokens >= 3 for request in requests)
    shared = [
        any(b.prompt[:32] == a.prompt[:32] for a in schedule.requests[:number] if len(a.prompt) >= 32)
        for schedule in schedules
        for number, b in enumerate(schedule.requests)
    ]
    assert 0.2 < np.mean(shared) < 0.6
    assert len({schedule.chunk for schedule in schedules}) > SEEDS / 2


def test_a_seed_gives_one_schedule_which_travels_as_json(script):
    schedule = script.Schedule.random(3)
    assert script.Schedule.random(3) == schedule != script.Schedule.random(4)
    assert script.Schedule.of(json.loads(json.dumps(asdict(schedule)))) == schedule


def test_a_request_that_is_itself_alone_differs_in_nothing(script):
    same = script.compared(run_of(script), run_of(script), LISTS)
    assert (same["difference"], same["other_codes"], same["parted"], same["lists"]) == (0, 0, None, 2)
    assert not any(same[name] for name in ("missing_lists", "other_lists_than_alone", "other_lists_than_reference"))


def test_what_differs_is_counted(script):
    logits = np.zeros((3, 5))
    logits[2, 4] = -0.5
    codes = [np.zeros((2, 3, 8), np.uint8), np.zeros((2, 4, 8), np.uint8)]
    codes[0][1, 2, 7] = 9  # before a preemption, when it had fewer pages
    other = {(0, 200): [[0, 2], [0, 1]]}
    found = script.compared(run_of(script, logits=logits, codes=codes, lists=other, preemptions=1), run_of(script), LISTS)
    assert (found["difference"], found["other_codes"], found["preemptions"]) == (0.5, 1, 1)
    assert (found["missing_lists"], found["other_lists_than_alone"], found["other_lists_than_reference"]) == (1, 1, 1)


def test_requests_are_compared_up_to_the_token_at_which_they_part(script):
    logits = np.zeros((3, 5))
    logits[1], logits[2] = 1e-3, 7.0
    parted = script.compared(run_of(script, tokens=[1, 4, 3], logits=logits), run_of(script), LISTS)
    assert (parted["parted"], parted["difference"], parted["other_codes"]) == (1, 1e-3, None)


def test_differences_of_requests_with_other_codes_stand_apart(script):
    same = script.compared(run_of(script, logits=np.full((3, 5), 1e-5), cached=32), run_of(script), LISTS)
    other = script.compared(
        run_of(script, logits=np.full((3, 5), 1e-3), codes=[np.ones((2, 4, 8), np.uint8)]), run_of(script), LISTS
    )
    chunk = script.compared(run_of(script, logits=np.full((3, 5), 1e-4), in_chunks=2), run_of(script), LISTS)
    rows = [script.summary(0, 4, [same, other, same]), script.summary(1, 2, [same, chunk])]
    assert (rows[0]["aborted"], rows[0]["prefix_hits"]) == (1, 2)
    whole = script.totals(rows)
    assert (whole["requests"], whole["lists"]) == (6, 10) and "seed" not in whole
    expected = {"same": (3, 1e-5), "in_chunks": (1, 1e-4), "other_codes": (1, 1e-3)}
    assert {name: tuple(group.values()) for name, group in whole["groups"].items()} == expected
    assert rows[1]["groups"]["other_codes"] == {"requests": 0, "largest_difference": None}


def test_an_engine_that_ends_early_is_reported_with_its_output(script, tmp_path, monkeypatch):
    engine = tmp_path / "engine.py"
    engine.write_text("import sys; open(sys.argv[2], 'w').write('{}\\n'); sys.exit('no memory')")
    monkeypatch.setattr(script, "ENGINE", engine)
    with pytest.raises(script.UsageError, match="the engine of stock ended with status 1: no memory"):
        script.measured("stock", "float32", [script.Schedule.random(0)], tmp_path)


def test_rows_follow_what_runs(script, tmp_path, monkeypatch, capsys):
    engine = tmp_path / "engine.py"
    row = script.summary(0, 1, [script.compared(run_of(script), run_of(script), LISTS)])
    lines = [json.dumps({"vllm": "0"}), json.dumps(row)]
    engine.write_text(
        "import json, sys; plan = json.load(open(sys.argv[1])); assert plan['elastickv'] and plan['products'] == 'float64'\n"
        f"open(sys.argv[2], 'w').write({chr(10).join([*lines, ''])!r})"
    )
    monkeypatch.setattr(script, "ENGINE", engine)
    run = script.measured("elastickv", "float64", [script.Schedule.random(0)], tmp_path)
    assert (run["backend"], run["products"], run["environment"], run["schedules"]) == (
        "elastickv",
        "float64",
        {"vllm": "0"},
        [row],
    )
    assert run["totals"]["lists"] == 2
    assert capsys.readouterr().out.splitlines() == [f"elastickv, products in float64: {line}" for line in lines]
