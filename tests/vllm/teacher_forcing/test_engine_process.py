"""The process of an engine: its replies, its failures, its end."""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from elastickv.errors import NonFiniteError, UsageError
from elastickv.vllm.teacher_forcing import engine_process
from elastickv.vllm.teacher_forcing.engine_process import running_engine


@pytest.fixture(autouse=True)
def fake(monkeypatch, tmp_path):
    """Let another program answer, and temporary files be in a folder of the test's."""
    monkeypatch.setattr(engine_process, "_WORKER", "tests.helpers.fake_engine_worker")
    monkeypatch.setattr(engine_process, "_WAIT_S", 0.3)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    yield
    assert list(tmp_path.iterdir()) == []


def is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_engine_answers_one_request_after_the_other():
    with running_engine({"model": "works"}) as engine:
        assert engine.recipes == {0: "int8", 1: "int4"}
        logits = engine.logits([1, 2, 3], [4, 5])
        assert (logits.shape, logits.dtype, float(logits[0, 0])) == ((2, 7), np.float32, 3)
        assert engine.greedy([1], [9], 3) == [9, 9, 9]
        assert engine.logits([1], [2]).shape == (1, 7)
    assert not is_running(engine.environment["process"])


@pytest.mark.parametrize(("user", "started"), [(None, "ours"), ("the user's", "the user's")])
def test_variables_of_the_user_are_left_alone(monkeypatch, user, started):
    if user is not None:
        monkeypatch.setenv("STARTED_WITH", user)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # the model must be within reach
    with running_engine({"model": "works"}, {"STARTED_WITH": "ours"}) as engine:
        assert engine.environment["started"] == [started, "0"]


def test_the_log_stays_where_a_file_is_named_and_nothing_is_imported_from_the_current_folder(monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("current")
    if sys.version_info >= (3, 11):  # as vLLM needs
        (folder / "json.py").write_text("raise AssertionError", encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setenv(engine_process.LOG_VARIABLE, str(folder / "engine.log"))
    with running_engine({"model": "works"}) as engine:
        assert engine.greedy([1], [2], 1) == [2]
    for _ in range(2):
        with pytest.raises(UsageError, match=r"ValueError: no such model"), running_engine({"model": "ends"}):
            raise AssertionError("it has not started")
    assert (folder / "engine.log").read_text(encoding="utf-8").count("no such model") == 2


@pytest.mark.parametrize("error", [UsageError, NonFiniteError])
def test_an_expected_error_arrives_as_it_is(error):
    with pytest.raises(error, match=r"^what was wrong$"), running_engine({"model": error.__name__}):
        raise AssertionError("it has not started")


def test_another_error_is_vllms():
    expected = "^vLLM does not run this model with these options: what was wrong$"
    with pytest.raises(UsageError, match=expected), running_engine({"model": None}):
        raise AssertionError("it has not started")


@pytest.mark.parametrize(
    ("logged", "expected"),
    [
        ("elastickv.errors.UsageError: what was wrong", "^what was wrong$"),
        ("torch.OutOfMemoryError: no room", "^vLLM does not run this model with these options: OutOfMemoryError: no room$"),
        ("it stopped", "^vLLM does not run this model with these options: Exception: failed in a background process"),
    ],
)
def test_an_error_of_a_rank_is_told_in_place_of_a_remark_that_there_was_one(logged, expected):
    with pytest.raises(UsageError, match=expected), running_engine({"model": f"rank: {logged}"}):
        raise AssertionError("it has not started")


def test_a_process_that_ends_by_itself_is_named_with_its_last_line():
    with (
        pytest.raises(UsageError, match=r"^vLLM ended with status 3: ValueError: no such model$"),
        running_engine({"model": "ends"}),
    ):
        raise AssertionError("it has not started")


def test_a_process_that_is_killed_is_named():
    with (
        pytest.raises(UsageError, match=r"^vLLM ended with status -9: it said nothing$"),
        running_engine({"model": "is killed"}) as engine,
    ):
        engine.greedy([1], [2], 1)


@pytest.mark.parametrize("model", ["works", "stays"])
def test_a_process_ends_with_the_block_whatever_happens(model):
    with pytest.raises(KeyboardInterrupt), running_engine({"model": model}) as engine:
        raise KeyboardInterrupt
    assert not is_running(engine.environment["process"])
