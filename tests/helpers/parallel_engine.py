"""An engine in processes of its own: `python -m tests.helpers.parallel_engine OPTIONS`, as JSON, prints its answers as JSON.

`engine` in the options are vLLM's. Each rank of a data-parallel engine answers all prompts.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MARK = "ANSWERS"
LIMIT_S = 400


def ask(prompts, tokens, variables=(), **engine):
    """Return the answers of an engine with these options, of vLLM's `AsyncLLM`: for each rank of data, one for each prompt.

    `variables` are of the environment.
    """
    return ask_and_count(prompts, tokens, variables, **engine)[0]


def ask_and_count(prompts, tokens, variables=(), **engine):
    """Return what `ask` does, and ElasticKV's counters by their names, without vLLM's prefix, all ranks of data together."""
    import numpy as np

    from tests.helpers.serving_engine import Answer

    command = [sys.executable, "-m", __name__, json.dumps({"engine": engine, "prompts": prompts, "tokens": tokens})]
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    environment.update(variables)
    output = in_own_session(command, environment)
    lines = [line.partition(MARK)[2] for line in output.splitlines() if MARK in line]
    assert lines, output[-4000:]
    found = []
    said = json.loads(lines[-1])
    for number, (chosen, logprobs) in enumerate(said["answers"]):
        answer = Answer(prompts[number % len(prompts)], chosen, logprobs)
        answer.window_first = np.zeros(len(answer.sequence), int)
        found.append(answer)
    return [found[first : first + len(prompts)] for first in range(0, len(found), len(prompts))], said["counters"]


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
        return {"answers": found, "counters": read_counters(get_metrics_snapshot())}
    finally:
        serving.shutdown()


def main():
    os.environ.update(VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    print(MARK + json.dumps(asyncio.run(answers(**json.loads(sys.argv[1])))), flush=True)


if __name__ == "__main__":
    main()
