"""An engine in processes of its own: `python -m tests.helpers.parallel_engine OPTIONS`, as JSON, prints its answers as JSON.

`engine` in the options are vLLM's. Each rank of a data-parallel engine answers all prompts.
"""

import asyncio
import contextlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
MARK = "ANSWERS"
LIMIT_S = 400
TOKENS_BEFORE_KILL = 4  # tokens of each request after which a process is killed
EXIT_LIMIT_S = 60


@dataclass
class EngineResult:
    """What an engine returned.

    Attributes
    ----------
    answers : for each rank of data, one for each prompt.
    counters : ElasticKV's by their names, without vLLM's prefix, all ranks of data together.
    blocks : of its KV cache, which all ranks of a model have.
    """

    answers: list
    counters: dict
    blocks: int


def ask(prompts, tokens, variables=(), **engine):
    """Ask an engine with these options, of vLLM's `AsyncLLM`; return its `EngineResult`.

    `variables` are of the environment.
    """
    import numpy as np

    from tests.helpers.serving_engine import Answer

    said, _ = result_of({"engine": engine, "prompts": prompts, "tokens": tokens}, variables)
    found = []
    for number, (chosen, logprobs) in enumerate(said["answers"]):
        answer = Answer(prompts[number % len(prompts)], chosen, logprobs)
        answer.window_first = np.zeros(len(answer.sequence), int)
        found.append(answer)
    by_rank = [found[first : first + len(prompts)] for first in range(0, len(found), len(prompts))]
    return EngineResult(by_rank, said["counters"], said["blocks"])


def kill_rank(rank, prompts, tokens, **engine):
    """Kill a process of the model while an engine answers; return the outcome, and what the engine's processes logged.

    The outcome has `errors`, one for each request, `seconds` until all requests had ended, how many of the engine's processes
    `ended` and how many did not (`left`), and `counts`, the tokens of each request.
    """
    return result_of({"engine": engine, "prompts": prompts, "tokens": tokens, "rank": rank})


def result_of(asked, variables=()):
    """Return what `main` printed, and the whole output of its processes; `variables` are of the environment."""
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    environment.update(variables)
    output = in_own_session([sys.executable, "-m", __name__, json.dumps(asked)], environment)
    lines = [line.partition(MARK)[2] for line in output.splitlines() if MARK in line]
    assert lines, output[-4000:]
    return json.JSONDecoder().raw_decode(lines[-1])[0], output  # other processes may write behind it


def workers_of(process):
    """Return the processes that run a model by their ranks of tensor parallelism, among those that a process has started."""
    found = {}
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if match := re.search(r"VLLM::Worker_TP(\d+)", " ".join(child.cmdline())):
                found[int(match[1])] = child
    return found


def in_own_session(command, environment):
    """Return what a command says, all in one text; what it started ends with it."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    try:
        return process.communicate(timeout=LIMIT_S)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


async def answers(engine, prompts, tokens):
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.reader import get_metrics_snapshot

    from tests.helpers.serving_engine import read_counters

    serving = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine))
    ranks = engine.get("data_parallel_size", 1)
    params = SamplingParams(
        temperature=0,
        max_tokens=tokens,
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )

    async def answer(number):
        rank, place = divmod(number, len(prompts))
        prompt = {"prompt_token_ids": prompts[place]}
        to = {"data_parallel_rank": rank} if ranks > 1 else {}
        last = None
        async for output in serving.generate(prompt, params, f"request-{number}", **to):
            last = output
        part = last.outputs[0]
        rows = part.logprobs or ()  # none where an error ended the request
        logprobs = [row[token].logprob for token, row in zip(part.token_ids, rows, strict=True)]
        return list(part.token_ids), logprobs

    try:
        found = await asyncio.gather(*(answer(number) for number in range(ranks * len(prompts))))
        blocks = serving.vllm_config.cache_config.num_gpu_blocks
        return {"answers": found, "counters": read_counters(get_metrics_snapshot()), "blocks": blocks}
    finally:
        serving.shutdown()


async def errors_after_kill(engine, prompts, tokens, rank):
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    serving, me, counts = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine)), psutil.Process(), [0] * len(prompts)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    params.output_kind = RequestOutputKind.DELTA

    async def error_of(number):
        try:
            async for output in serving.generate({"prompt_token_ids": prompts[number]}, params, f"request-{number}"):
                counts[number] += len(output.outputs[0].token_ids)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "finished"

    requests = [asyncio.create_task(error_of(number)) for number in range(len(prompts))]
    while min(counts) < TOKENS_BEFORE_KILL:
        await asyncio.sleep(0.02)
    processes = [child for child in me.children(recursive=True) if "VLLM::" in " ".join(child.cmdline())]
    workers_of(me)[rank].kill()
    began = time.monotonic()
    errors = await asyncio.gather(*requests)
    seconds = time.monotonic() - began
    serving.shutdown()
    deadline = time.monotonic() + EXIT_LIMIT_S
    while (left := sum(map(is_alive, processes))) and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    return {"errors": errors, "seconds": seconds, "ended": len(processes) - left, "left": left, "counts": counts}


def is_alive(process):
    """Whether a process goes on; one that nobody waits for has ended, too."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def fork_on_cpus():
    """Let vLLM fork its processes on CPUs, where each that it spawns imports all modules for ten seconds."""
    from vllm.platforms import current_platform
    from vllm.utils import system_utils

    if current_platform.is_cpu():
        system_utils.get_mp_context = lambda: multiprocessing.get_context("fork")


def main():
    os.environ.update(VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    asked = json.loads(sys.argv[1])
    fork_on_cpus()
    act = errors_after_kill if "rank" in asked else answers
    print(MARK + json.dumps(asyncio.run(act(**asked))), flush=True)


if __name__ == "__main__":
    main()
