"""The line that says what CUDA graphs took, from what vLLM's model runners log."""

import logging
from pathlib import Path

import pytest
import vllm

from elastickv.vllm import capacity
from elastickv.vllm.capacity import GraphMemory

RUNNER = "vllm.v1.worker.gpu.model_runner"


@pytest.fixture
def captured(caplog):
    """Return a function that logs as vLLM does after a capture, and returns the lines of ElasticKV."""
    watch = GraphMemory()
    watch.start()

    def log(gib, runner=RUNNER, text="Graph capturing finished in %.0f secs, took %.2f GiB"):
        logging.getLogger(runner).info(text, 7.0, gib)
        return [record.getMessage() for record in caplog.records if record.name == "vllm.elastickv"]

    with caplog.at_level(logging.INFO):
        yield log
    watch.stop()


@pytest.mark.parametrize("runner", capacity._RUNNERS)
def test_graphs_are_said_once_in_mb(captured, runner):
    assert captured(0.5, runner) == ["ElasticKV: graphs 537 MB"]
    assert captured(0.25, runner) == ["ElasticKV: graphs 537 MB"]


def test_memory_that_other_processes_freed_meanwhile_is_no_negative_size(captured):
    assert captured(-0.01) == ["ElasticKV: graphs 0 MB"]


def test_other_lines_of_the_runner_say_nothing(captured, caplog):
    assert captured(0.5, text="Model loading took %.0f s and %.2f GiB") == []
    assert len(caplog.records) == 1


def test_both_runners_of_vllm_still_log_it():
    """Files are read, not imported: they need a GPU's packages."""
    for runner in capacity._RUNNERS:
        path = Path(vllm.__file__).parent.parent.joinpath(*runner.split(".")).with_suffix(".py")
        assert f'"{capacity._CAPTURED} in %.0f secs, took %.2f GiB"' in path.read_text(encoding="utf-8")
