"""The presets, the original's schedule, and dense and int8 on every shape of the anchor table, one result file each.

    python benchmarks/bench_matrix.py --output benchmarks/results/h100 [--only presets|shapes] [--reps N]

Each file is a whole `elastickv bench` result; `summary.md` puts the figures side by side.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

# (batch, query heads, KV heads, head_dim, context)
SHAPES = [
    (1, 32, 32, 128, 4096),
    (1, 16, 16, 64, 1024),
    (1, 32, 8, 128, 4096),
    (1, 32, 8, 128, 32768),
    (1, 32, 8, 128, 131072),
    (8, 32, 8, 128, 4096),
    (8, 32, 8, 128, 32768),
    (32, 32, 8, 128, 8192),
    (32, 32, 8, 128, 32768),
    (1, 8, 1, 128, 131072),
]
ORIGINAL = "reuse,decay=0.95,sinks=0,window=0"


def presets() -> dict[str, list[str]]:
    long, cycle = ["--preset=long"], ["--inference"]
    far = ["--seq=131072", "--heads=32", "--kv-heads=8", "--dim=128", "--compress=4"]
    return {
        "short": ["--preset=short", *cycle],
        "long": [*long, *cycle],
        "long-original-schedule": [*long, *cycle, f"--recipe={ORIGINAL}"],
        "long-stride": [*long, *cycle, "--recipe=stride"],
        "131072": [*far, *cycle],
        "131072-original-schedule": [*far, *cycle, f"--recipe={ORIGINAL}"],
    }


def shapes() -> dict[str, list[str]]:
    names = ("--batch", "--heads", "--kv-heads", "--dim", "--seq")
    return {
        "-".join(map(str, ("shape", *shape))): [
            *(f"{name}={size}" for name, size in zip(names, shape, strict=True)),
            *("--recipe=int8", "--compress=1", "--peers", f"--inner_loops={32 if shape[0] * shape[4] >= 65536 else 64}"),
        ]
        for shape in SHAPES
    }


def line(name: str, result: dict) -> str:
    times = {t["name"]: t["time_ms"] * 1e3 for t in result["contenders"]}
    peers = {n: t for n, t in times.items() if n.startswith("torch")}
    own = min((t for n, t in times.items() if n.startswith("dense")), default=float("nan"))
    best_peer = min(peers.values(), default=float("nan"))
    cycle = result["inference_cycle"]
    sample = result["fidelity"]["sample"]
    error = f"{sample['recipe_error']['mean']:.4f}" if sample else "-"
    return (
        f"| {name} | {result['recipe']['text']} | {result['recipe']['ratio_read']:.2f} | {own:.1f} | {best_peer:.1f} | "
        f"{times['elastic']:.1f} | {result['speedup']['estimate']:.3f} [{result['speedup']['low']:.3f}, "
        f"{result['speedup']['high']:.3f}] | {cycle['speedup_vs_baseline'] if cycle else float('nan'):.3f} | "
        f"{result['roofline']['dense']['score']:.2f} / {result['roofline']['elastic']['score']:.2f} | {error} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", choices=("presets", "shapes"))
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--reps", type=int, default=40)
    parser.add_argument("--time-limit", type=float, default=15.0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    runs = {**(presets() if arguments.only != "shapes" else {}), **(shapes() if arguments.only != "presets" else {})}
    lines = [
        "| run | recipe | C read | own dense, us | best peer, us | elastic, us | speed-up | cycle | roofline | recipe error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    common = [f"--reps={arguments.reps}", f"--time-limit={arguments.time_limit:g}", f"--backend={arguments.backend}"]
    for name, given in runs.items():
        start, target = time.monotonic(), arguments.output / f"{name}.json"
        # A process each: what one leaves in the driver, the allocators or the caches must not reach the next.
        command = [sys.executable, "-m", "elastickv", "bench", *given, *common, "--warmup=3", "--paired-baseline"]
        done = subprocess.run([*command, f"--output={target}"], capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]
            print(f"{name}: exit {done.returncode}: {done.stderr[-1500:]}", file=sys.stderr, flush=True)
            lines.append(f"| {name} | not run: {said[0][:120]} |||||||||")
            continue
        lines.append(line(name, json.loads(target.read_text(encoding="utf-8"))))
        print(f"{lines[-1]}  ({time.monotonic() - start:.1f} s)", flush=True)
    (arguments.output / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
