"""Where a user reads what is wrong with the options: in processes that are started as users start them."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
OPTIONS = {"elastickv": {"format": "int4", "window": 31}}
LINE = "elastickv option window is 31: give a whole number of tokens from 32 to 4096"
OFFLINE = """
import sys

from vllm import LLM

if __name__ == "__main__":
    LLM(sys.argv[1], additional_config=%r, dtype="float32", max_model_len=256, enforce_eager=True, skip_tokenizer_init=True)
"""


def run(*command):
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), environment.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=500, check=False)


def test_a_server_ends_with_the_line_before_it_looks_for_the_model(plug_in):
    ended = run("-m", "vllm.entrypoints.openai.api_server", "--model", "no/model", "--additional-config", json.dumps(OPTIONS))
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == f"ElasticKV: {LINE}"
    assert "Traceback" not in ended.stderr


def test_offline_the_line_ends_the_traceback_of_the_engines_process(plug_in, serve, folder, tmp_path):
    serve.close()
    script = tmp_path / "offline.py"
    script.write_text(OFFLINE % OPTIONS, encoding="utf-8")
    ended = run(str(script), str(folder))
    assert ended.returncode != 0
    lines = [line for line in (ended.stdout + ended.stderr).splitlines() if line.endswith(LINE)]
    assert lines and all("UsageError" in line for line in lines)
    assert "initialization failed" in ended.stderr.splitlines()[-1]
