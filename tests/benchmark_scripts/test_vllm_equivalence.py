"""The comparison of vLLM's engine and `ElasticCache`: the cache's side anywhere, both sides where vLLM is installed."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.tiny_models import tiny_gguf, tiny_llama

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT, SOURCE = BENCHMARKS / "vllm_equivalence.py", BENCHMARKS.parent / "src"
WINDOW = 64


@pytest.fixture
def script(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("vllm_equivalence")
    for name in ("vllm_equivalence", "read_rule"):
        sys.modules.pop(name, None)


def run(*arguments):
    command, environment = [sys.executable, str(SCRIPT), *arguments], os.environ | {"PYTHONPATH": str(SOURCE)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that the script converted from a .gguf file, and that file."""
    for package in ("transformers", "gguf"):
        pytest.importorskip(package)
    path = tmp_path_factory.mktemp("models")
    done = run(f"--convert={tiny_gguf(path / 'tiny.gguf')}", f"--folder={path / 'tiny'}")
    assert done.returncode == 0, done.stderr
    return path / "tiny"


def pair(records, of, measured):
    return next(record for record in records if (record["of"], record["measured"]) == (of, measured))


def test_the_aligned_cache_predicts_what_its_rule_predicts(script):
    model, ids = tiny_llama().model, [(i * i * 7 + i // 3) % 128 for i in range(200)]
    before = model.config._attn_implementation
    logits = script.transformers_logits(model, ids, "int8", WINDOW)
    assert model.config._attn_implementation == before
    assert set(logits) == {"full attention", "rule of the engine", "rule, aligned", "cache, aligned", "cache"}
    records = script.compared(logits, ids, WINDOW)
    aligned, quantized = pair(records, "rule, aligned", "cache, aligned"), pair(records, "full attention", "cache, aligned")
    assert aligned["tokens"] == len(ids) - WINDOW - 1
    assert aligned["kl_mean"] < 1e-6 < quantized["kl_mean"]


def test_only_tokens_that_read_a_page_are_compared(script):
    ids = list(range(40))
    same, other = np.zeros((40, 8), np.float32), np.zeros((40, 8), np.float32)
    other[:32, 3] = 5
    (record,) = script.compared({"full attention": same, "cache": other}, [i % 8 for i in ids], 32)
    assert record["tokens"] == 7 and record["kl_max"] == 0 and record["same_top"] == 1
    other[35, 3] = 5
    (record,) = script.compared({"full attention": same, "cache": other}, [i % 8 for i in ids], 32)
    assert record["kl_max"] > 0 and record["same_top"] < 1


def test_a_converted_model_is_the_model(folder):
    import torch

    from elastickv.transformers.model_loading import load_model

    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        plain, converted = (load_model(str(name)).model(ids).logits for name in (folder.with_suffix(".gguf"), folder))
    assert torch.equal(plain, converted)


def test_a_folder_is_needed():
    done = run("--tokens=100")
    assert done.returncode == 2 and "--folder is needed" in done.stderr


def test_the_engine_predicts_what_the_cache_and_its_own_rule_predict(tmp_path):
    pytest.importorskip("vllm")
    pytest.importorskip("transformers")
    from tests.helpers.tiny_models import framing_tokenizer

    folder, output = tmp_path / "tiny", tmp_path / "equivalence.json"
    tiny_llama().model.save_pretrained(folder)
    framing_tokenizer().save_pretrained(folder)
    done = run(f"--folder={folder}", "--tokens=200", f"--window={WINDOW}", "--format=int8", f"--output={output}")
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    assert record["model"] == "tiny" and str(tmp_path) not in json.dumps(record)
    for measured in ("engine", "engine, one chunk"):
        assert pair(record["pairs"], "rule of the engine", measured)["kl_mean"] < 1e-6
    assert pair(record["pairs"], "cache, aligned", "engine, aligned")["kl_mean"] < 1e-4
    assert pair(record["pairs"], "full attention", "engine")["kl_mean"] > 1e-6
