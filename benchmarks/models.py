"""A whole model end to end: stock caches and the elastic one, one `elastickv bench --model` a cell, each in its own process.

    python benchmarks/models.py --out benchmarks/results/h100 [--cells "65536x1,4096x1"] [--model shape:8b] [--compress 4]

A cell is CONTEXTxBATCH; its whole result is the file model-NAME-CONTEXTxBATCH.json, and a line summarizes it. For a
cell that fails or takes too long the line has the reason, and the exit status is 1. All cells end within `--time-limit`.
The steps of a sample are as many as a page has tokens, so that every sample quantizes equally often.
"""

import argparse
import re
import sys
import time
from pathlib import Path

from child_process import run_command
from command_line import exit_with

import elastickv

CELLS = "65536x1,4096x1,32768x8,32768x1"
_CELL = re.compile(r"([1-9]\d*)x([1-9]\d*)")
_PAGE_TOKENS = 32


def parse_cells(text: str) -> list[tuple[int, int]]:
    """Return (context, batch) pairs."""
    matches = [_CELL.fullmatch(one.strip()) for one in text.split(",")]
    if not all(matches):
        raise argparse.ArgumentTypeError(f"{text}: give CONTEXTxBATCH, separated by commas, such as {CELLS}")
    return [(int(match[1]), int(match[2])) for match in matches if match]


def cell_file(model: str, cell: tuple[int, int], label: str = "") -> str:
    """Return the name of a cell's result."""
    name = re.sub(r"[^\w.]+", "-", Path(model).name.removeprefix("shape:"))
    return f"model-{name}-{cell[0]}x{cell[1]}{label and '-'}{label}.json"


def measure(cell: tuple[int, int], target: Path, arguments: argparse.Namespace, seconds: float) -> str | None:
    """Run a cell; return None, or why there is no result."""
    command = [sys.executable, "-m", "elastickv", "bench", f"--model={arguments.model}", f"--context={cell[0]}"]
    command += [f"--batch={cell[1]}", f"--compress={arguments.compress:g}", f"--reps={arguments.reps}"]
    command += [f"--decode-tokens={arguments.tokens}", f"--output={target}", *arguments.options]
    target.unlink(missing_ok=True)
    status, text = run_command(command, seconds, only_errors=True)
    said = [line.strip() for line in text.splitlines() if line.strip()]
    last = said[-1] if said else "nothing was said"
    if status is None:
        return f"not done after {seconds:.0f} s, at: {last}"
    return None if status == 0 and target.is_file() else f"exit status {status}: {last}"


def _figure(interval: dict | None, unit: str = "") -> str:
    """Return an estimate with its interval, as far as there were enough pairs."""
    if interval is None:
        return "too few pairs"
    bounds = "" if interval["low"] is None else f" [{interval['low']:.2f}, {interval['high']:.2f}]"
    return f"{interval['estimate']:.2f}{unit}{bounds}"


def line(result: dict) -> str:
    """Return what a cell came to."""
    parts = [
        f"{cache['cache']} {cache['tokens_per_s']:.1f} tokens/s, {_figure(cache['step_ms'], ' ms')}, "
        f"{cache['of_floor']:.2f}x the floor of {cache['floor_ms']:.2f}, first token "
        f"{cache['first_token_s']:.2f} s{_storing(cache)}, holds {_gb(cache['held_bytes'])}, "
        f"peak {_gb(cache['peak_bytes'])}"
        for cache in result["caches"]
    ]
    for name, ratio in result["speedups"].items():
        if ratio is not None:
            parts.append(f"elastic / {name} {_figure(ratio)}")
    parts += [f"not run: {name}: {reason}" for name, reason in result["not_run"].items()]
    return "; ".join(parts)


def _storing(cache: dict) -> str:
    share = cache.get("storing_share_of_first_token")
    return "" if share is None else f" (storing {100 * share:.1f} %)"


def _gb(count: float | None) -> str:
    return "?" if count is None else f"{count / 1e9:.2f} GB"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the result files")
    parser.add_argument("--cells", type=parse_cells, default=parse_cells(CELLS), help=f"CONTEXTxBATCH,...  [default: {CELLS}]")
    parser.add_argument("--model", default="shape:8b")
    parser.add_argument("--compress", type=float, default=4.0)
    parser.add_argument("--label", default="", help="what tells these files from others of the same cells")
    parser.add_argument("--reps", type=int, default=6, help="samples of each cache")
    parser.add_argument("--tokens", type=int, default=_PAGE_TOKENS, help="steps of a sample")
    parser.add_argument("--cell-timeout", type=float, default=240.0, help="seconds after which a cell is given up")
    parser.add_argument("--time-limit", type=float, default=570.0, help="seconds after which all of them are")
    parser.add_argument("options", nargs="*", help="further options of `elastickv bench`, after --")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    started, failures = time.monotonic(), 0
    for cell in arguments.cells:
        began = time.monotonic()
        target = arguments.out / cell_file(arguments.model, cell, arguments.label)
        left = arguments.time_limit - (began - started)
        failed = measure(cell, target, arguments, min(arguments.cell_timeout, left)) if left > 0 else "no time left"
        failures += failed is not None
        said = failed or line(elastickv.load(target))
        print(f"{cell[0]}x{cell[1]}: {said}  ({time.monotonic() - began:.0f} s)", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    exit_with(main)
