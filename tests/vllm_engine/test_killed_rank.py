"""A process of the model that is killed while it answers: requests end with an error, and what is said names the process."""

import threading
import time

import psutil
import pytest

from elastickv.errors import UsageError
from elastickv.vllm.teacher_forcing.engine_process import running_engine
from tests.helpers.parallel_engine import kill_rank, workers_of
from tests.helpers.serving_engine import DEFAULTS
from tests.helpers.serving_scenarios import RECIPE, WINDOW, random_prompts

PLUG_IN = {"elastickv": {"format": RECIPE, "window": WINDOW}}
ENDED_S = 60  # vLLM gives the other processes 5 s to end, and again 4 s


def test_requests_end_with_an_error_and_the_log_names_the_process(serve, folder):
    serve.close()
    options = DEFAULTS | {"model": str(folder), "tensor_parallel_size": 2, "additional_config": PLUG_IN}
    outcome, log = kill_rank(1, random_prompts((40, 100)), 900, **options)
    assert all(error.startswith("EngineDeadError") for error in outcome["errors"]), outcome
    assert "VllmWorker-1 died unexpectedly (exit code: -9)" in log
    assert outcome["seconds"] < ENDED_S and (outcome["ended"], outcome["left"]) == (3, 0)  # the engine's and two of the model
    assert max(outcome["counts"]) < 900


def test_an_evaluation_names_the_process(serve, folder):
    serve.close()
    options = DEFAULTS | {"model": str(folder), "tensor_parallel_size": 2, "additional_config": PLUG_IN, "max_num_seqs": 1}
    (prompt,) = random_prompts((100,))

    def kill():
        time.sleep(2)
        workers_of(psutil.Process())[1].kill()

    with running_engine(options, {"VLLM_CPU_KVCACHE_SPACE": "1"}) as engine:
        assert len(engine.greedy(prompt, prompt[:1], 4)) == 4
        killing = threading.Thread(target=kill)
        killing.start()
        began = time.monotonic()
        with pytest.raises(
            UsageError, match=r"^a process in which vLLM runs a part of the model ended: VllmWorker-1 \(exit code -9\)"
        ):
            engine.greedy(prompt, prompt[:1], 900)
        assert time.monotonic() - began < ENDED_S
        killing.join()
