"""The presets, the original's schedule, and dense and int8 on every shape of the anchor table, one result file each.

    python benchmarks/bench_matrix.py --output benchmarks/results/h100 [--only presets|shapes] [--reps N]

Each file is a whole `elastickv bench` result; `summary.md` puts the figures side by side.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from elastickv.bench import Options, run
from elastickv.report import dumps

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
LONG = {"seq": 4096, "heads": 32, "dim": 128, "compress": 4.0}


def presets() -> dict[str, dict]:
    cycle = {"inference": True}
    return {
        "short": {"seq": 1024, "heads": 16, "dim": 64, "compress": 2.0} | cycle,
        "long": LONG | cycle,
        "long-original-schedule": LONG | cycle | {"recipe": ORIGINAL},
        "long-stride": LONG | cycle | {"recipe": "stride"},
        "131072": {"seq": 131072, "heads": 32, "kv_heads": 8, "dim": 128, "compress": 4.0} | cycle,
        "131072-original-schedule": {
            "seq": 131072,
            "heads": 32,
            "kv_heads": 8,
            "dim": 128,
            "compress": 4.0,
            "recipe": ORIGINAL,
        },
    }


def shapes() -> dict[str, dict]:
    return {
        "-".join(map(str, ("shape", *shape))): {
            "batch": shape[0],
            "heads": shape[1],
            "kv_heads": shape[2],
            "dim": shape[3],
            "seq": shape[4],
            "recipe": "int8",
            "compress": 1.0,
            "peers": True,
        }
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
    for name, given in runs.items():
        start = time.monotonic()
        options = Options(
            **given,
            reps=arguments.reps,
            warmup=3,
            inner_loops=32 if given["seq"] * given.get("batch", 1) >= 65536 else 64,
            paired=True,
            time_limit_s=arguments.time_limit,
            backend=arguments.backend,
        )
        try:
            result = json.loads(dumps(run(options).as_dict()))
        except Exception as error:  # one cell must not cost the others
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            lines.append(f"| {name} | not run: {type(error).__name__}: {str(error)[:120]} |||||||||")
            continue
        (arguments.output / f"{name}.json").write_text(dumps(result), encoding="utf-8")
        lines.append(line(name, result))
        print(f"{lines[-1]}  ({time.monotonic() - start:.1f} s)", flush=True)
    (arguments.output / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
