"""A rank of a split model that is killed in the middle of a generation: the others do not wait for it, and do not go on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.model_matrix import model

ROOT = Path(__file__).parents[2]
SCRIPT = "tests.helpers.killed_rank"
LIMIT_S = 240

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or os.name == "nt", reason="PyTorch is built without torch.distributed, or no SIGKILL"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    model("llama", num_attention_heads=8, num_key_value_heads=4, vocab_size=212).save_pretrained(folder / "model")
    return folder


def started(command, **variables):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "USE_LIBUV": "0"} | variables,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def under_torchrun(folder, backend):
    """Return what torchrun says, its exit status, and the seconds that it took."""
    began = time.monotonic()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    process = started([*launcher, SCRIPT, str(folder), backend])
    try:
        return process.communicate(timeout=LIMIT_S)[0], process.returncode, time.monotonic() - began
    finally:
        process.kill()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="PyTorch is built without gloo")
def test_the_other_rank_raises_at_once_and_whenever_it_goes_on(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", SCRIPT, str(folder), "gloo"]
    ranks = [started(command, RANK=str(rank), LOCAL_RANK=str(rank), **master) for rank in range(2)]
    try:
        said = [rank.communicate(timeout=LIMIT_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [1, -signal.SIGKILL], said
    outcome = json.loads((folder / "0.json").read_text())
    assert all(outcome[which].startswith("RuntimeError") and "gloo" in outcome[which] for which in ("error", "again")), outcome
    assert outcome["seconds"] < 10
    assert not (folder / "1.json").exists()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="PyTorch is built without gloo")
def test_torchrun_names_the_rank(folder):
    said, status, _ = under_torchrun(folder, "gloo")
    assert status == 1
    assert "rank      : 1 (local_rank: 1)" in said and "Signal 9 (SIGKILL)" in said


@pytest.mark.gpu
@pytest.mark.usefixtures("two_gpus")
def test_torchrun_ends_ranks_that_wait_on_a_gpu(folder):
    """NCCL alone would wait for minutes: a rank that is gone closes no connection of a kernel that runs."""
    said, status, seconds = under_torchrun(folder, "nccl")
    print(f"measured: {seconds:.0f} s with the start")
    assert status == 1 and seconds < 120
    assert "rank      : 1 (local_rank: 1)" in said and "Signal 9 (SIGKILL)" in said
