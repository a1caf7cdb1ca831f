"""A model of Transformers on one GPU and split over several (`tp_plan="auto"`): ms a token with stock and elastic caches.

    python benchmarks/tensor_parallel.py --output FILE [--gpus 1,2] [--model shape:8b] [--context 65536] [--compress 1,4,8]

Each number of GPUs is one run: a process for each GPU, started by torchrun. Weights are random in a published shape, the same
on all ranks, or `--model` is a folder of real ones. A step is timed on the first rank, from one token's arrival at the host to
the next one's. The file is written after every run; one that fails is named in it. `--device cpu` is for trying it.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from child_process import run_command
from command_line import exit_with, whole_number

from elastickv.benchmark.environment import environment
from elastickv.results.files import check_writable, write_text

STOCK = "stock"
SETTLING = 12  # tokens before those that are timed: kernels are loaded, and graphs recorded
RANK_VARIABLES = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}  # that torchrun sets, and their values without it
REPORTED = ("first_token_s", "kv_allocated_bytes", "read_ratio", "captured_share", "not_captured", "recipe_hash", "peak_bytes")


def load(name: str, device: Any, dtype: Any, ranks: int) -> Any:
    """Return this rank's part of a model, or the model if there is one rank."""
    from transformers import AutoModelForCausalLM

    from elastickv.model_benchmark.shapes import built, shape_named

    split = {"tp_plan": "auto"} if ranks > 1 else {}
    if shape_named(name) is None:
        placed = split or {"device_map": str(device)}
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **placed).eval()
    whole = built(name, {"bfloat16": "bf16", "float32": "fp32"}[str(dtype).removeprefix("torch.")], str(device)).model
    if not split:
        return whole
    # A copy of the whole model is on every GPU until its part is taken.
    return type(whole).from_pretrained(None, config=whole.config, state_dict=whole.state_dict(), dtype=dtype, **split).eval()


def caches_of(plan: dict[str, Any]) -> dict[str, float | None]:
    """Return the names of the caches that are measured, with their C; None is Transformers' own."""
    return {STOCK: None} | {f"C={ratio:g}": ratio for ratio in plan["compress"]}


def measure(plan: dict[str, Any], rank: int, ranks: int, device: Any) -> list[dict[str, Any]]:
    """Return the figures of each cache, and write them after each on the first rank."""
    import torch

    from elastickv.model_benchmark.generation import Sampling, elastic, stock
    from elastickv.transformers.config import UncalibratedWarning

    warnings.simplefilter("ignore", UncalibratedWarning)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load(plan["model"], device, dtype, ranks)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, model.config.vocab_size, (1, plan["context"]), generator=generator)
    mask, sampling = torch.ones_like(ids), Sampling(ends=False)
    new_tokens = SETTLING + plan["tokens"] * plan["samples"]
    rows = []
    for name, ratio in caches_of(plan).items():
        if ratio is None:
            text = stock(model, ids, mask, sampling)
        else:
            text = elastic(model, ids, mask, sampling, plan["context"] + new_tokens, {"compress": ratio})
        text.advance(SETTLING)
        samples = []
        for _ in range(plan["samples"]):
            if ranks > 1:
                torch.distributed.barrier()
            piece = text.advance(plan["tokens"])
            samples.append(1e3 * statistics.fmean(piece.step_s))
        figures = text.metrics()
        rows.append(
            {"cache": name, "compress": ratio, "ms": statistics.median(samples), "samples_ms": samples}
            | {key: figures[key] for key in REPORTED if key in figures}
            | {"tokens_sha256": _digest(text.text_ids())}
        )
        del text
        if rank == 0:
            write_text(Path(plan["rows"]), json.dumps(rows))
    return rows


def _digest(texts: list[list[int]]) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]


def of_rank(plan_file: str) -> None:
    """Measure on one rank of those that torchrun started, or on the only one."""
    import torch

    plan = json.loads(Path(plan_file).read_text(encoding="utf-8"))
    rank, ranks, local = (int(os.environ.get(name, default)) for name, default in RANK_VARIABLES.items())
    device = torch.device("cpu" if plan["device"] == "cpu" else f"cuda:{local}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    measure(plan, rank, ranks, device)
    if rank == 0:
        about = {"torch": torch.__version__, "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU"}
        write_text(Path(plan["about"]), json.dumps(about))
    if ranks > 1:
        torch.distributed.barrier()
    # Everything is written, and destroying a process group that CUDA graphs refer to may hang.
    sys.stdout.flush()
    os._exit(0)


def run(count: int, arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Measure on a number of GPUs; return the record, with `failed`: None, or why the run did not finish."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        files = {name: str(Path(folder) / f"{name}.json") for name in ("plan", "rows", "about")}
        plan = {name: getattr(arguments, name) for name in ("model", "context", "compress", "tokens", "samples", "device")}
        Path(files["plan"]).write_text(json.dumps(plan | files), encoding="utf-8")
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
        command = [sys.executable, *launcher, __file__, f"--rank-of={files['plan']}"]
        status, output = run_command(command, seconds, {"OMP_NUM_THREADS": "4"} | dict(os.environ))
        rows, about = (
            json.loads(Path(files[name]).read_text(encoding="utf-8")) if Path(files[name]).exists() else []
            for name in ("rows", "about")
        )
    failed = None
    if status is None or status:
        lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
        message = next((line for line in lines if "Error" in line and not line.startswith("File ")), lines[-1])
        failed = f"not finished after {seconds:.0f} s: {lines[-1]}" if status is None else f"exit status {status}: {message}"
    return {"gpus": count, "failed": failed, "seconds": time.monotonic() - began, "rows": rows} | dict(about)


def line(one: dict[str, Any]) -> str:
    """Return the line that is printed about a run."""
    parts = [f"{row['cache']} {row['ms']:.2f} ms, first token {row['first_token_s']:.1f} s" for row in one["rows"]]
    parts += [one["failed"]] if one["failed"] else []
    return f"{one['gpus']} GPU{'s' if one['gpus'] > 1 else ''}: {'; '.join(parts)} ({one['seconds']:.0f} s)"


def main() -> int:
    arguments = parse_arguments()
    if arguments.rank_of:
        of_rank(arguments.rank_of)
    check_writable(arguments.output)
    started, runs = time.monotonic(), []
    settings = {name: getattr(arguments, name) for name in ("context", "tokens", "samples")}
    for count in arguments.gpus:
        left = arguments.time_limit - (time.monotonic() - started)
        runs.append(run(count, arguments, left))
        print(line(runs[-1]), flush=True)
        result = {
            "kind": "elastickv-tensor-parallel",
            "version": 1,
            "environment": environment(),
            "command": ["benchmarks/tensor_parallel.py", *(word for word in sys.argv[1:] if not word.startswith("/"))],
            "model": arguments.model if arguments.model.startswith("shape:") else Path(arguments.model).name,
            "settings": settings,
            "runs": runs,
        }
        write_text(arguments.output, json.dumps(result, indent=1) + "\n")
    return 1 if any(one["failed"] for one in runs) else 0


def _numbers(kind: type, text: str) -> list[Any]:
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if not all(number > 0 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: give positive numbers, separated by commas")
    return numbers


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("tensor_parallel.json"), help="the result file")
    parser.add_argument(
        "--gpus", type=lambda text: _numbers(int, text), default=[1, 2], help="numbers of GPUs, separated by commas"
    )
    parser.add_argument("--model", default="shape:8b", help="random weights in a shape, or a folder of real ones")
    parser.add_argument("--context", type=whole_number, default=65536, help="tokens of the prompt")
    parser.add_argument(
        "--compress", type=lambda text: _numbers(float, text), default=[1.0, 4.0, 8.0], help="values of C, separated by commas"
    )
    parser.add_argument("--tokens", type=whole_number, default=32, help="tokens of a sample")
    parser.add_argument("--samples", type=whole_number, default=3, help="samples of each cache")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds that all runs may take")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    exit_with(main)
