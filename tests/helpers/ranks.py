"""Run a task in several processes over which a model is split."""

import gc
import json
import os
import socket
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

Task = Callable[[Path], dict[str, Any]]


def run_on_ranks(task: Task, folder: Path, count: int, backend: str) -> list[dict[str, Any]]:
    """Return the results of `task`, an importable function, from each of `count` processes, as read back from JSON."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_one, (task, folder, count, backend, port), nprocs=count)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def _one(rank: int, task: Task, folder: Path, count: int, backend: str, port: int) -> None:
    import numba

    torch.set_num_threads(1)
    numba.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "USE_LIBUV": "0"}
    if backend == "nccl":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count, timeout=timedelta(seconds=60)
    )
    try:
        (folder / f"{rank}.json").write_text(json.dumps(task(folder)))
    finally:
        gc.collect()  # graphs go before what they talk through
        torch.distributed.destroy_process_group()


def split(folder: Path, **options: Any) -> Any:
    """Return a rank's part of the model in `folder`."""
    import transformers as tf

    return tf.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", **options).eval()
