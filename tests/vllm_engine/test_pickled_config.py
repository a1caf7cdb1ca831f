"""vLLM's configuration in processes that unpickle it before they load plug-ins: spawned ones of the model, and Ray's."""

import copy
import json
import pickle
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import cloudpickle
import pytest

from tests.helpers.serving_engine import DEFAULTS
from tests.helpers.serving_scenarios import RECIPE, WINDOW

ROOT = Path(__file__).parents[2]
PICKLERS = (ForkingPickler.dumps, cloudpickle.dumps)
# Each pickle is read by a process of its own, which has imported vLLM and no plug-in.
READER = """
import json, os, pickle, sys
import vllm.config
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

for written in pickle.load(sys.stdin.buffer):
    if os.fork():
        if os.wait()[1]:
            sys.exit(1)
        continue
    assert "ELASTICKV" not in AttentionBackendEnum.__members__, "plug-ins are loaded"
    config, spec = pickle.loads(written)
    load_general_plugins()
    backend = config.attention_config.backend
    said = {
        "backend": [backend.name, backend.get_path(), backend is AttentionBackendEnum["ELASTICKV"]],
        "names": sum(each.name == "ELASTICKV" for each in AttentionBackendEnum),
        "scheduler": config.scheduler_config.get_scheduler_cls().__module__,
        "options": config.additional_config,
        "window": [spec.sliding_window, KVCacheSpecRegistry.get_manager_class(spec).__name__],
    }
    print(json.dumps(said), flush=True)
    break
"""


@pytest.fixture(scope="module")
def config(serve, folder):
    from vllm import EngineArgs

    from elastickv.vllm.window_spec import choose_scheduler

    serve.close()
    plug_in = {"elastickv": {"format": RECIPE, "window": WINDOW}}
    asked = EngineArgs(**DEFAULTS, model=str(folder), attention_backend="ELASTICKV", additional_config=plug_in)
    made = asked.create_engine_config()
    choose_scheduler(made.scheduler_config)
    return made


def test_processes_without_plug_ins_unpickle_the_configuration(config):
    import torch

    from elastickv.vllm.window_spec import WindowSpec

    spec = WindowSpec(
        block_size=8,
        num_kv_heads=2,
        head_size=64,
        dtype=torch.uint8,
        state_content_bytes=256,
        sliding_window=WINDOW,
        steps_in_flight=1,
        rollback_tokens=0,
        hit_tokens=0,
    )
    written = pickle.dumps([bytes(dumps((config, spec))) for dumps in PICKLERS])
    read = subprocess.run([sys.executable, "-c", READER], input=written, capture_output=True, cwd=ROOT)
    assert read.returncode == 0, read.stderr.decode()[-3000:]
    said = [json.loads(line) for line in read.stdout.splitlines() if line.startswith(b"{")]
    expected = {
        "backend": ["ELASTICKV", "elastickv.vllm.attention_backend.ElasticAttentionBackend", True],
        "names": 1,
        "scheduler": "elastickv.vllm.fail_on_nan_scheduler",
        "options": config.additional_config,
        "window": [WINDOW, "WindowManager"],
    }
    assert said == [expected] * len(PICKLERS)


def test_copies_of_backends_are_themselves(config):
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    assert copy.deepcopy(config).attention_config.backend is config.attention_config.backend
    for backend in AttentionBackendEnum:
        assert pickle.loads(pickle.dumps(backend)) is copy.copy(backend) is backend
