"""The commands and examples of docs/vllm.md run, on the CPU: they are asked of a tiny model instead of the one they name."""

import argparse
import ast
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.helpers.served_llama import random_weights, write_model

PAGE = (Path(__file__).parents[2] / "docs" / "vllm.md").read_text(encoding="utf-8")
DOCUMENTED_ADDRESS = "http://localhost:8000"
START_S = 400
SMALL = {"max_model_len": 512, "max_num_seqs": 4, "enforce_eager": True}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def commands(*words):
    """Return the words of every command of the page that begins with these."""
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith(" ".join(words))]


def python_block(*words):
    (block,) = [block for block in blocks("python") if all(word in block for word in words)]
    return block


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("served_by_name") / "llama", random_weights(), tokenizer=True)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory, plug_in):
    """Start the server as the page says for CPUs; yield its address and what it has logged at the start."""
    (command,) = commands("python", "-m")
    named = re.search(r'"model": "([^"]*)"', "\n".join(blocks("sh")))[1]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    small = [f"--{key.replace('_', '-')}" + (f"={value}" if value is not True else "") for key, value in SMALL.items()]
    name = command.index("--model") + 1
    program = [sys.executable, *command[1:name], str(model), *command[name + 1 :]]
    log, address = tmp_path_factory.mktemp("log") / "server.txt", f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*program, "--served-model-name", named, "--host", "127.0.0.1", "--port", str(port), *small],
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        wait_for(process, f"{address}/health", log)
        yield address, log.read_text(encoding="utf-8", errors="replace")
    finally:
        # With the processes of its engine, which would outlive a server that does not answer.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(process, url, log):
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text(encoding="utf-8", errors="replace")[-4000:]
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (OSError, urllib.error.URLError):
            time.sleep(0.5)
    raise AssertionError(log.read_text(encoding="utf-8", errors="replace")[-4000:])


def test_the_server_of_the_page_stores_pages_and_says_so_in_one_line(server):
    _, log = server
    (line,) = [line for line in log.splitlines() if "ElasticKV: page" in line]
    assert "window 128 tokens" in line and "capacity" in line
    assert "capacity is lost" not in log


def test_the_client_of_the_page_is_answered(server, capsys):
    address, _ = server
    code = python_block("from openai")
    assert DOCUMENTED_ADDRESS in code
    exec(compile(code.replace(DOCUMENTED_ADDRESS, address), "docs/vllm.md", "exec"), {})
    chat, _, completion = capsys.readouterr().out.partition("\n")
    assert min(len(chat.split()), len(completion.split())) > 48  # of 64 tokens, some of which have no word


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_command_of_the_page_is_answered(server):
    address, _ = server
    (command,) = [block for block in blocks("sh") if block.startswith("curl")]
    assert DOCUMENTED_ADDRESS in command
    words = shlex.split(command.replace(DOCUMENTED_ADDRESS, address))
    done = subprocess.run([*words, "--silent", "--show-error"], capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert answer["usage"]["completion_tokens"] == 64 and answer["choices"][0]["message"]["content"]


def test_the_example_for_cpus_without_a_server_prints_text(model, plug_in, monkeypatch, capsys):
    import vllm

    engine, names = vllm.LLM, {}
    monkeypatch.setattr(vllm, "LLM", lambda name, **options: engine(str(model), **SMALL, **options))
    exec(compile(python_block("import LLM", "additional_config"), "docs/vllm.md", "exec"), names)
    assert capsys.readouterr().out.split()
    names.pop("llm").llm_engine.engine_core.shutdown()


def test_vllm_knows_every_flag_of_the_page():
    from vllm.entrypoints.cli.serve import ServeSubcommand

    parser = ServeSubcommand().subparser_init(argparse.ArgumentParser().add_subparsers())
    servers = commands("vllm", "serve") + commands("python", "-m")
    shown = {word for words in servers for word in words if word.startswith("--")} | set(re.findall(r"`(--[a-z-]+)", PAGE))
    assert {"--attention-backend", "--kv-cache-dtype", "--additional-config"} <= shown
    assert shown - parser._option_string_actions.keys() == set()


def test_vllm_knows_every_argument_of_the_examples():
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    calls = [node for block in blocks("python") for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    shown = {word.arg for call in calls if getattr(call.func, "id", None) == "LLM" for word in call.keywords}
    assert shown == {"attention_backend", "kv_cache_dtype", "additional_config"}
    assert shown <= known
