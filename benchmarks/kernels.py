"""Decode attention on every shape of the table: every peer, our dense and our recipes, one `elastickv bench` a cell.

    python benchmarks/kernels.py --output benchmarks/results/h100/kernels [--shapes "1,32,8,128,4096;..."] [--recipes "int8;.."]
    python benchmarks/kernels.py --output benchmarks/results/h100 --presets

A shape is batch,query heads,KV heads,head_dim,context; a recipe may end in @C, the budget it is solved for. The first cell of
a shape is measured beside every installed peer, the others beside the fastest 16-bit and the fastest 8-bit one of that cell.
A solved recipe is measured in the inference cycle too: its whole step is append, score, select, decode and merge, over whole
anchor intervals and the quantization of pages. Each cell's whole result is a file; `table.json` holds the rows, `summary.md`
shows them. A cell that fails or does not fit is a row with the reason. `--resume` keeps the cells whose files are there,
`--tables` measures nothing.

Ceiling: (dense bytes / bytes read) x (read ceiling / bandwidth of the fastest 16-bit peer), the most that any kernel can gain.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import elastickv

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
RECIPES = ("int4", "int8", "fp8", "int4,vgroup=32", "auto@4", "auto@8")
# Column -> beginnings of the names and whether keys and values are 16 bit: the fastest of them is shown.
PEER_COLUMNS = {
    "SDPA flash": ("torch-sdpa-flash", True),
    "SDPA cuDNN": ("torch-sdpa-cudnn", True),
    "SDPA efficient": ("torch-sdpa-efficient", True),
    "FlexAttention": ("flex-attention", True),
    "FlashAttention 3": ("flash-attention-3", True),
    "FlashInfer": ("flashinfer", True),
    "FlashInfer fp8 KV": ("flashinfer", False),
}
DENSE_DTYPES = ("fp32", "fp16", "bf16")
ORIGINAL = "reuse,decay=0.95,sinks=0,window=0"
# A sample is about this many bytes of dense reads: milliseconds on a device that reads terabytes a second.
SAMPLE_BYTES = 2e10


def presets() -> dict[str, list[str]]:
    long = ["--preset=long", "--inference"]
    far = ["--seq=131072", "--heads=32", "--kv-heads=8", "--dim=128", "--compress=4", "--inference"]
    return {
        "short": ["--preset=short", "--inference"],
        "long": long,
        "long-original-schedule": [*long, f"--recipe={ORIGINAL}"],
        "long-stride": [*long, "--recipe=stride"],
        "131072": far,
        "131072-original-schedule": [*far, f"--recipe={ORIGINAL}"],
    }


def cell_name(shape: tuple[int, ...], recipe: str) -> str:
    return f"{'-'.join(map(str, shape))}--{re.sub(r'[^A-Za-z0-9.=]+', '-', recipe)}"


def cell_options(shape: tuple[int, ...], recipe: str) -> list[str]:
    names = ("--batch", "--heads", "--kv-heads", "--dim", "--seq")
    text, _, budget = recipe.partition("@")
    return [
        *(f"{name}={size}" for name, size in zip(names, shape, strict=True)),
        *(f"--recipe={text}", f"--compress={budget or 1}"),
        f"--inner-loops={max(8, min(64, int(SAMPLE_BYTES / dense_bytes(shape))))}",
        *(["--inference"] if budget else []),
    ]


def dense_bytes(shape: tuple[int, ...]) -> int:
    batch, _, kv_heads, head_dim, context = shape
    return 2 * 2 * batch * kv_heads * head_dim * context


def measure(options: list[str], target: Path, arguments: argparse.Namespace) -> str | None:
    """Run one cell in a process of its own; return why there is no result."""
    if arguments.tables or (arguments.resume and target.exists()):
        return None if target.exists() else "not measured"
    # A process each: what one leaves in the driver, the allocators or the caches must not reach the next.
    command = [sys.executable, "-m", "elastickv", "bench", *options, "--warmup=3", "--paired-baseline", f"--output={target}"]
    command += [f"--reps={arguments.reps}", f"--time-limit={arguments.time_limit:g}", f"--backend={arguments.backend}"]
    target.unlink(missing_ok=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=arguments.cell_timeout)
    except subprocess.TimeoutExpired:
        return f"took longer than {arguments.cell_timeout:g} s"
    if done.returncode and not target.exists():
        print(done.stderr[-2000:], file=sys.stderr, flush=True)
        said = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["no message"]
        return f"exit {done.returncode}: {said[-1].removeprefix('elastickv: error: ')[:300]}"
    return None


def fastest(result: dict, dense: bool, beginning: str = "") -> dict | None:
    """Return the fastest peer with 16-bit (or with narrower) keys and values."""
    peers = [timing for timing in result["contenders"] if timing["kind"] == "peer" and timing["name"].startswith(beginning)]
    return min((t for t in peers if (t["dtype"] in DENSE_DTYPES) == dense), key=lambda t: t["time_ms"], default=None)


def peers_after_first(result: dict | None, first: str) -> str:
    """Return the peers of the further cells of a shape: the fastest of its first cell, or `first` without a result."""
    best = [fastest(result, dense) for dense in (True, False)] if result else []
    return ",".join(timing["name"] for timing in best if timing) or first


def row(name: str, result: dict) -> dict:
    """Return a cell's figures; ratios are of two times in the same run."""
    times = {timing["name"]: timing for timing in result["contenders"]}
    elastic, recipe, sample = times["elastic"], result["recipe"], result["fidelity"]["sample"]
    own = min((t for t in times.values() if t["kind"] == "dense"), key=lambda t: t["time_ms"], default=None)
    if recipe["text"] == "dense":
        own = min((t for t in (own, elastic) if t), key=lambda t: t["time_ms"])
    peer, narrow = fastest(result, True), fastest(result, False)
    rival = peer or times[result["baseline"]["name"]]
    gain = rival["time_ms"] / elastic["time_ms"]
    ceiling = recipe["ratio_read"] * result["ceilings"]["read_gbs"] / rival["kv_bandwidth_gbs"]
    cycle, step = result["inference_cycle"], whole_step(result)
    kernel = result["fidelity"]["kernel_error"].get("elastic")

    def shown(timing: dict | None) -> dict | None:
        keys = ("name", "version", "dtype", "kv_bandwidth_gbs")
        return timing and {"us": 1e3 * timing["time_ms"]} | {key: timing[key] for key in keys}

    return {
        "cell": name,
        "recipe": recipe["text"],
        "hash": recipe["hash"],
        "dense_mb": recipe["dense_bytes_per_step"] / 1e6,
        "ratio_read": recipe["ratio_read"],
        "us": 1e3 * elastic["time_ms"],
        "kv_gbs": elastic["kv_bandwidth_gbs"],
        "read_ceiling_gbs": result["ceilings"]["read_gbs"],
        "own_dense": shown(own),
        "fastest_dense_peer": shown(peer),
        "fastest_narrow_peer": shown(narrow),
        "gain_over_rival": gain,
        "gain_over_narrow_peer": narrow["time_ms"] / elastic["time_ms"] if narrow else None,
        "rival": rival["name"],
        "ceiling": ceiling,
        "of_ceiling": gain / ceiling,
        "speedup": result["speedup"],
        "cycle_speedup": cycle["speedup_vs_baseline"] if cycle else None,
        "whole_step_us": step,
        "gain_of_whole_step": 1e3 * rival["time_ms"] / step if step else None,
        "token_latency_ms": cycle["elastic_token_latency_ms"] if cycle else None,
        "kernel_error": kernel["max"] if kernel else None,
        "recipe_error": sample["recipe_error"] if sample else None,
        "recipe_error_refused": result["fidelity"]["sample_refused"],
    }


def whole_step(result: dict) -> float | None:
    """Return the microseconds of a layer's whole step in the inference cycle."""
    cycle = result["inference_cycle"]
    return cycle and 1e3 * cycle["elastic_total_ms"] / cycle["decode_tokens"]


def cells_table(rows: list[dict]) -> list[str]:
    lines = [
        "| cell | recipe | hash | bytes read 1/ | us | GB/s | rival, us | rival / this | ceiling | of it | 8-bit peer / this | "
        "kernel error | recipe error | against the fastest dense | cycle | whole step, us | rival / whole step |",
        "|" + "---|" * 17,
    ]
    for r in rows:
        if "not_run" in r:
            lines.append(f"| {r['cell']} | not run: {r['not_run'].replace('|', '/')} |" + " |" * 15)
            continue
        peer = r["fastest_dense_peer"] or r["own_dense"]
        speedup = r["speedup"]
        lines.append(
            f"| {r['cell']} | `{r['recipe']}` | {r['hash']} | {r['ratio_read']:.2f} | {r['us']:.1f} | {r['kv_gbs']:.0f} | "
            f"{peer['us']:.1f} ({r['rival']}) | {r['gain_over_rival']:.2f} | {r['ceiling']:.2f} | {r['of_ceiling']:.2f} | "
            f"{optional(r['gain_over_narrow_peer'], '.2f')} | {optional(r['kernel_error'], '.1e')} | "
            f"{optional(r['recipe_error'] and r['recipe_error']['mean'], '.4f')} | "
            f"{speedup['estimate']:.3f} [{speedup['low']:.3f}, {speedup['high']:.3f}] | "
            f"{optional(r['cycle_speedup'], '.3f')} | {optional(r['whole_step_us'], '.1f')} | "
            f"{optional(r['gain_of_whole_step'], '.2f')} |"
        )
    return lines


def shapes_table(shapes: list[tuple[int, ...]], recipes: list[str], results: dict[str, dict]) -> list[str]:
    """Return the table of shapes: microseconds and, in brackets, 10^9 bytes of keys and values a second."""
    columns = [recipe for recipe in recipes if recipe != "dense"]
    lines = [f"| shape | KV MB | {' | '.join([*PEER_COLUMNS, 'our dense', *columns])} |"]
    lines.append("|" + "---|" * (3 + len(PEER_COLUMNS) + len(columns)))
    for shape in shapes:
        cells = {recipe: results.get(cell_name(shape, recipe)) for recipe in recipes}
        measured = [cell for cell in cells.values() if cell]
        # The first cell has every peer.
        peers = [fastest(measured[0], dense, name) if measured else None for name, dense in PEER_COLUMNS.values()]
        own = [row("", cell)["own_dense"] for cell in measured]
        dense = min((timing for timing in own if timing), key=lambda timing: timing["us"], default=None)
        ours = [cell and next(t for t in cell["contenders"] if t["name"] == "elastic") for cell in map(cells.get, columns)]
        entries = [
            *map(entry, peers),
            f"{dense['us']:.1f} ({dense['kv_bandwidth_gbs']:.0f})" if dense else "-",
            *map(entry, ours),
        ]
        lines.append(f"| {','.join(map(str, shape))} | {dense_bytes(shape) / 1e6:.0f} | {' | '.join(entries)} |")
    return lines


def entry(timing: dict | None) -> str:
    return f"{1e3 * timing['time_ms']:.1f} ({timing['kv_bandwidth_gbs']:.0f})" if timing else "-"


def optional(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def peers_not_run(results: dict[str, dict]) -> list[str]:
    """Return why peers are missing, a line for each reason."""
    cells: dict[tuple[str, str], list[str]] = {}
    for cell, result in results.items():
        for name, why in result["baseline"]["not_run"].items():
            # Sizes of tensors aside, it is one reason in every cell.
            cells.setdefault((name, re.sub(r"\[[^\]]*\]", "[..]", why)), []).append(cell)
    return [f"- {name}: {why} ({', '.join(where)})" for (name, why), where in sorted(cells.items())]


def named(result: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["environment"]["versions"].items() if version)
    return f"{result['gpu']['name']}, driver {result['gpu']['driver']}; {versions}; {result['date_utc'][:10]}"


def parse_shape(text: str) -> tuple[int, ...]:
    shape = tuple(int(size) for size in text.split(","))
    if len(shape) != 5:
        raise argparse.ArgumentTypeError(f"{text!r} is not batch,query heads,KV heads,head_dim,context")
    return shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the result files")
    parser.add_argument("--shapes", type=lambda text: [parse_shape(one) for one in text.split(";")], default=SHAPES)
    parser.add_argument("--recipes", type=lambda text: text.split(";"), default=list(RECIPES))
    parser.add_argument("--no-peers", action="store_true", help="measure beside our own dense attention alone")
    parser.add_argument("--peers", default="all", help="beginnings of the names of those measured in a shape's first cell")
    parser.add_argument("--presets", action="store_true", help="measure the presets and the original's schedule instead")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--reps", type=int, default=40)
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds a cell, compilation and peers included")
    parser.add_argument("--cell-timeout", type=float, default=900.0, help="seconds after which a cell is given up")
    parser.add_argument("--resume", action="store_true", help="keep the cells whose files are there")
    parser.add_argument("--tables", action="store_true", help="only write the tables")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows, results = [], {}

    def cell(name: str, options: list[str]) -> dict | None:
        start, target = time.monotonic(), arguments.output / f"{name}.json"
        failed = measure(options, target, arguments)
        if failed is None:
            results[name] = elastickv.load(target)
            rows.append(row(name, results[name]))
        else:
            rows.append({"cell": name, "not_run": failed})
        print(f"{cells_table(rows[-1:])[-1]}  ({time.monotonic() - start:.1f} s)", flush=True)
        write(arguments, rows, results)
        return results.get(name)

    if arguments.presets:
        for name, options in presets().items():
            cell(name, options)
        return
    for shape in arguments.shapes:
        first: dict | None = None
        for recipe in arguments.recipes:
            peers = [] if arguments.no_peers else [f"--peers={peers_after_first(first, arguments.peers)}"]
            result = cell(cell_name(shape, recipe), [*cell_options(shape, recipe), *peers])
            first = first or result


def write(arguments: argparse.Namespace, rows: list[dict], results: dict[str, dict]) -> None:
    """Write the tables of what is there so far."""
    lines = [named(next(iter(results.values()))), ""] if results else []
    if not arguments.presets:
        note = "us (GB/s of keys and values read); peers as measured beside the first recipe."
        lines += [note, "", *shapes_table(arguments.shapes, arguments.recipes, results), ""]
    lines += [*cells_table(rows), ""]
    missing = peers_not_run(results)
    lines += ["Not run:", "", *missing, ""] if missing else []
    (arguments.output / "summary.md").write_text("\n".join(lines), encoding="utf-8")
    (arguments.output / "table.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from command_line import exit_with

    exit_with(main)
