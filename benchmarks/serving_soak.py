"""A soak of vLLM with ElasticKV and with its stock backend: answers, memory and step times under a random load.

    python benchmarks/serving_soak.py --output benchmarks/results/h200/serving_soak.json [--steps 5000] [--time-limit 360]

A small model with random weights answers requests of random lengths that arrive, share prefixes, are sampled several times,
aborted and preempted, in a pool too small for them. Then some of them are given again, each alone in a fresh cache: what the
soak answered is read as one prompt, twice, the second time in smaller chunks. The divergence of what was read from what was
generated is compared with the stock backend's, and with that of the two readings, which have no load. All blocks must be free
again, memory must not grow, and steps that only decode are timed. What is asked is judged, under `verdicts`; with soft
prefix reuse tokens may depend on what was cached, so the divergence of `strict` is the one that is judged.

A number that another batch rounds otherwise may get another code, a whole step away, so pages of 4 bits make stock's
differences larger whatever the load is. Two comparisons say what the load does beyond that: with the two readings, and with
vLLM's own quantized caches (`stock-int4`, `stock-fp8`), whose codes flip as ours do.

The backends run one after the other, in processes of their own; the result is written anew as they go, so that it is there, in
part, when one is killed. The first of them compiles what the others find.
"""

import argparse
import json
import math
import os
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the model with random weights is the tests'

from child_process import run_command
from command_line import exit_with

from elastickv.benchmark.environment import environment
from elastickv.errors import UsageError
from elastickv.results.files import check_writable, write_text
from elastickv.results.kinds.soak_result import SOAK_KIND, SOAK_VERSION
from elastickv.vllm.serving_options import PAGE_FORMATS
from elastickv.vllm.versions import installed_version, minor_version
from tests.helpers.served_llama import Sizes, random_weights, write_model

STOCK = {"stock": None, "stock-fp8": "fp8", "stock-int4": "int4_per_token_head"}  # vLLM's own, with their KV cache dtypes
BACKENDS = ("ours", "strict", *STOCK)  # "strict" is ours with strict prefix reuse
DEFAULT_BACKENDS = {"cuda": ["ours", "stock", "strict", "stock-int4"], "cpu": ["ours", "stock", "strict"]}
ENGINE = Path(__file__).with_name("soak_engine.py")
MOST_GROWTH = 64 << 20  # bytes, of allocated memory after the warm-up
MOST_LOGGED = 20  # lines of the plug-in's
FIRST_START_S = {"cuda": 40.0, "cpu": 0.0}  # by which the first engine's start takes longer: what it compiles is kept
MOST_P999 = 3.0  # medians, of steps that only decode
ERRORS = 2.0  # standard errors by which a divergence may be larger


@dataclass(frozen=True)
class Scale:
    """Sizes of model, requests and pool on a kind of device. `blocks` are fewer than the requests need, by backend."""

    sizes: Sizes
    requests: int
    batched_tokens: int
    longest_prompt: int
    longest_answer: int
    blocks: dict[str, int]


SCALES = {
    "cuda": Scale(
        Sizes(layers=4, hidden=1024, inner=2816, heads=8, kv_heads=2, head_dim=128, vocabulary=4096),
        requests=32,
        batched_tokens=512,
        longest_prompt=1500,
        longest_answer=300,
        blocks={"ours": 800, "stock": 340},
    ),
    "cpu": Scale(
        Sizes(),
        requests=6,
        batched_tokens=192,
        longest_prompt=400,
        longest_answer=80,
        blocks={"ours": 160, "stock": 36},
    ),
}


def engine_options(backend: str, device: str, fmt: str, dtype: str | None = None) -> dict:
    """Return the arguments of `vllm.LLM`."""
    scale = SCALES[device]
    options = {
        "dtype": dtype or ("bfloat16" if device == "cuda" else "float32"),
        "block_size": 32,
        "max_model_len": scale.longest_prompt + scale.longest_answer + 32,
        "max_num_seqs": scale.requests,
        "max_num_batched_tokens": scale.batched_tokens,
        "num_gpu_blocks_override": scale.blocks["stock" if backend in STOCK else "ours"],
        "enable_prefix_caching": True,
        "skip_tokenizer_init": True,
        "seed": 0,
    }
    if device == "cuda":
        graphs = [1, 2, 4, *range(8, scale.requests + 1, 8)]
        options |= {"gpu_memory_utilization": 0.3, "async_scheduling": True, "cudagraph_capture_sizes": graphs}
    else:
        options |= {"enforce_eager": True}
    if kv_cache_dtype := STOCK.get(backend):
        options["kv_cache_dtype"] = kv_cache_dtype
    if backend not in STOCK:
        plug_in = {"prefix_reuse": "strict"} if backend == "strict" else {}
        offered = minor_version(getattr(installed_version(), "version", ""))
        if device == "cuda":
            options["attention_backend"] = "ELASTICKV"
        if device == "cuda" and offered is not None and offered.named_cache_dtypes:
            options["kv_cache_dtype"] = f"elastickv_{fmt}"
        else:
            plug_in["format"] = fmt
        if plug_in:
            options["additional_config"] = {"elastickv": plug_in}
    return options


def run_backend(backend: str, arguments: argparse.Namespace, folder: Path, seconds: float, write) -> dict:
    """Run one backend; return its record, with `failed`: None, or why it did not get to its end.

    `write` is called with the record as it grows.
    """
    scale = SCALES[arguments.device]
    plan = {
        "model": str(folder / "model"),
        "ours": backend not in STOCK,
        "scan_modules": arguments.device == "cpu",
        "engine": engine_options(backend, arguments.device, arguments.format, arguments.dtype),
        "vocabulary": scale.sizes.vocabulary,
        "longest_prompt": scale.longest_prompt,
        "longest_answer": scale.longest_answer,
        "seed": arguments.seed,
        "steps": arguments.steps,
        "seconds": seconds,
    }
    plan_file, record_file = folder / f"{backend}.plan.json", folder / f"{backend}.json"
    plan_file.write_text(json.dumps(plan), encoding="utf-8")
    settings = {
        "SOAK_BEGAN": str(time.time()),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    defaults = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    command = [sys.executable, str(ENGINE), str(plan_file), str(record_file)]
    seen = 0.0

    def look() -> None:
        nonlocal seen
        if record_file.exists() and (changed := record_file.stat().st_mtime) > seen:
            seen = changed
            write({"engine": plan["engine"]} | json.loads(record_file.read_text(encoding="utf-8")))

    status, log = run_command(command, seconds, defaults | dict(os.environ) | settings, look)
    record = json.loads(record_file.read_text(encoding="utf-8")) if record_file.exists() else {"done": False}
    stopped = f"not done after {seconds:.0f} s" if status is None else f"exit status {status}"
    record["failed"] = None if record["done"] else record.get("error") or stopped
    record["logged"] = [text for text in log.splitlines() if "ElasticKV:" in text][:MOST_LOGGED]
    if record["failed"]:
        print(log[-4000:], file=sys.stderr)
    return {"engine": plan["engine"]} | record


def faults(backend: str, record: dict) -> list[str]:
    """Return what is wrong with a backend's record: what must not be, whatever stock does. Times are not judged."""
    wrong = [f"{backend}: {record['failed']}"] if record.get("failed") else []
    for name in ("blocks", "blocks_after_check"):
        blocks = record.get(name)
        if blocks and (blocks["free_at_start"] != blocks["free_at_end"] or not blocks["prefix_cache_reset"]):
            wrong.append(
                f"{backend}: {blocks['free_at_start']} blocks were free at the start, {blocks['free_at_end']} at the end"
            )
    if record.get("not_finite"):
        wrong.append(f"{backend}: {record['not_finite']} log-probabilities are not finite")
    wrong += [f"{backend}: {text}" for text in record.get("logged", []) if "answer is wrong" in text]
    growth = record.get("growth", {}).get("torch_bytes", 0)
    if growth > MOST_GROWTH:
        wrong.append(f"{backend}: PyTorch holds {growth} bytes more at the end than after the warm-up")
    return wrong


def verdicts(backends: dict[str, dict]) -> list[dict]:
    """Return what is asked of the soak: `what`, whether it `holds` (None: it was not measured), and the figures.

    Divergences are compared within `ERRORS` standard errors of their difference.
    """
    found = []
    for backend in (name for name in backends if name not in STOCK):
        record = backends[backend]
        blocks = [record[name] for name in ("blocks", "blocks_after_check") if name in record]
        kept = all(each["free_at_start"] == each["free_at_end"] and each["prefix_cache_reset"] for each in blocks)
        found.append(_verdict(f"{backend}: all blocks are free again", kept if len(blocks) == 2 else None, blocks))
        grown = record.get("growth", {}).get("torch_bytes")
        found.append(_verdict(f"{backend}: memory does not grow", None if grown is None else grown <= MOST_GROWTH, grown))
        ratio = record.get("times", {}).get("decode", {}).get("p999_over_median")
        what = f"{backend}: p99.9 of steps that only decode is below {MOST_P999:g} medians"
        found.append(_verdict(what, None if ratio is None else ratio < MOST_P999, ratio))
    judged = "strict" if "strict" in backends else "ours"
    divergences = {name: record.get("agreement", {}).get("all", {}) for name, record in backends.items()}
    own = divergences.get(judged, {})
    comparisons = [
        (f"{judged}: the divergence from requests alone is within stock's", divergences.get("stock", {}).get("soak")),
        (f"{judged}: it is within that of the same tokens read alone in other chunks", own.get("chunks")),
    ]
    comparisons += [
        (f"{judged}: it is within that of vLLM's own {dtype}", divergences[name].get("soak"))
        for name, dtype in STOCK.items()
        if dtype and name in backends
    ]
    for what, other in comparisons:
        one = own.get("soak")
        if not (one and other and one["tokens"] and other["tokens"]):
            found.append(_verdict(what, None, None))
            continue
        error = math.hypot(one["kl_error"], other["kl_error"])
        figures = {"kl": one["kl"], "of": other["kl"], "error": error, "requests": own["requests"]}
        found.append(_verdict(what, one["kl"] - other["kl"] <= ERRORS * error, figures))
    return found


def _verdict(what: str, holds: bool | None, figures: object) -> dict:
    return {"what": what, "holds": holds, "figures": figures}


def growth(memory: list[dict]) -> dict:
    """Return by how many bytes each kind of memory grew from the first note, after the warm-up, to the last."""
    return {key: memory[-1][key] - value for key, value in memory[0].items() if key != "step"} if len(memory) > 1 else {}


def line(backend: str, record: dict) -> str:
    """Return what a backend did in one line."""
    decode, counts = record.get("times", {}).get("decode", {}), record.get("counts", {})
    words = [f"{backend}: {record.get('steps', 0)} steps"]
    words += [f"{counts[key]} {key.replace('_', ' ')}" for key in ("preemptions", "aborted", "prefix_hits") if key in counts]
    if decode.get("steps"):
        ratio = f"p99.9/median {decode['p999_over_median']:.2f}"
        words.append(f"decode median {decode['median_ms']:.2f} ms, p99 {decode['p99_ms']:.2f} ms, {ratio}")
    if whole := record.get("agreement", {}).get("all"):
        words += [
            f"{name}: divergence {whole[name]['kl']:.2e} +- {whole[name]['kl_error']:.1e}"
            for name in ("soak", "chunks")
            if whole[name]["tokens"]
        ]
    return ", ".join(words)


def main() -> int:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so end the process that runs
    try:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{arguments.output} cannot be written ({error.strerror}): choose another --output") from error
    check_writable(arguments.output)
    started, scale = time.monotonic(), SCALES[arguments.device]
    result: dict = {
        "kind": SOAK_KIND,
        "version": SOAK_VERSION,
        "date_utc": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": ["benchmarks/serving_soak.py", *(word for word in sys.argv[1:] if not word.startswith("/"))],
        "settings": {name: getattr(arguments, name) for name in ("steps", "time_limit", "device", "format", "dtype", "seed")}
        | {"model": asdict(scale.sizes), "longest_prompt": scale.longest_prompt, "longest_answer": scale.longest_answer},
        "environment": environment(),
        "device": None,
        "driver": None,
        "backends": {},
        "verdicts": [],
    }

    def write(backend: str, record: dict) -> None:
        about = record.get("environment", {})
        result.update({key: about[key] for key in ("device", "driver") if key in about})
        result["backends"][backend] = record | {"growth": growth(record.get("memory", []))}
        result["verdicts"] = verdicts(result["backends"])
        write_text(arguments.output, json.dumps(result, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(folder / "model", random_weights(scale.sizes), scale.sizes)
        for place, backend in enumerate(arguments.backends):
            left, runs = arguments.time_limit - (time.monotonic() - started), len(arguments.backends) - place
            more = FIRST_START_S[arguments.device] if place == 0 and runs > 1 else 0.0
            share = more + (left - more) / runs
            record = run_backend(backend, arguments, folder, share, lambda record, name=backend: write(name, record))
            record["engine"].pop("model", None)
            write(backend, record)
            print(line(backend, record), flush=True)
    wrong = [fault for backend, record in result["backends"].items() for fault in faults(backend, record)]
    for fault in wrong:
        print(f"serving_soak.py: {fault}", file=sys.stderr)
    for each in result["verdicts"]:
        answer = {True: "yes", False: "NO", None: "not measured"}[each["holds"]]
        print(f"{each['what']}: {answer} ({json.dumps(each['figures'])})", flush=True)
    return 1 if wrong or any(each["holds"] is False for each in result["verdicts"]) else 0


def _backends(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in BACKENDS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no backend: give some of {', '.join(BACKENDS)}")
    return names


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--backends", "--backend", type=_backends, help=", ".join(BACKENDS))
    parser.add_argument("--steps", type=int, default=5000, help="of the engine under load, for each backend")
    parser.add_argument("--time-limit", type=float, default=360.0, help="seconds that all of it may take")
    parser.add_argument("--format", choices=tuple(PAGE_FORMATS), default="int4", help="of pages")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="of the model; default: bfloat16 on a GPU, float32 on a CPU"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the load")
    parser.add_argument("--device", choices=SCALES, default="cuda")
    arguments = parser.parse_args()
    arguments.backends = arguments.backends or DEFAULT_BACKENDS[arguments.device]
    if arguments.device == "cpu" and (quantized := [name for name in arguments.backends if STOCK.get(name)]):
        parser.error(f"vLLM has no {STOCK[quantized[0]]} on CPUs: leave {quantized[0]} out of --backends, or use --device cuda")
    return arguments


if __name__ == "__main__":
    exit_with(main)
