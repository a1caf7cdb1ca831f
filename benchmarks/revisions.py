"""Compare the kernel times of two source trees in one run, to see whether a change cost speed.

    git worktree add /tmp/before REVISION
    python benchmarks/revisions.py --before /tmp/before/src --output benchmarks/results/h200/revisions.json

Each tree runs in a process of its own on the same GPU. For every cell both processes build the same captured graphs (decode
of every recipe; for the recipes of a budget also the whole step of the inference cycle: append, score, select, decode), and
launches alternate in mirrored order (before, after, after, before). The ratio is after / before with a 95 % interval over the
pairs; a control column holds two halves of the same tree against each other.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import numpy as np
from command_line import exit_with

ROOT = Path(__file__).resolve().parents[1]
KIND, VERSION = "elastickv-revisions", 1
# (batch, query heads, KV heads, head_dim, context)
SHAPES = [(1, 32, 8, 128, 4096), (1, 32, 8, 128, 32768), (8, 32, 8, 128, 32768), (1, 32, 32, 128, 4096)]
RECIPES = ("dense", "int8", "fp8", "int4", "auto@4", "auto@8")
CYCLED = ("auto@4", "auto@8")
# A launch goes round copies of the cache that exceed the last-level cache several times.
ROTATED_BYTES, MOST_COPIES, STEPS = 4 << 28, 64, 64
LEAST_PAIRS, WARM_UP_ROUNDS = 6, 4
CYCLE_LAYERS, CYCLE_ROOM, CYCLE_TOKENS = 4, 4096, 8


class Worker:
    """The other end of `serve`: a process that measures with the package of one source tree."""

    def __init__(self, source: Path, *arguments: str, script: str = __file__) -> None:
        paths = [str(source), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, str(Path(script).resolve()), "--serve", *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of a tree ended: {self.process.wait()}")
        return json.loads(line)

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def serve(name):
    """Measure what the lines of standard input ask for, with whichever `elastickv` PYTHONPATH leads to."""
    from elastickv.backends import load

    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr
    backend, programs = load(name)[0], {}
    for line in sys.stdin:
        request = json.loads(line)
        if "shape" in request:
            programs.clear()
            programs = build(backend, tuple(request["shape"]), request["recipe"])
            answer = {"programs": sorted(programs)}
        else:
            program, steps = programs[request["program"]]
            if request["program"] == "cycle":
                program.reset()
            answer = {"us": [1000 * ms / steps for ms in program.run(request["launches"])]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def build(backend, shape, recipe_text):
    """Return name -> (program, steps of a launch) of one cell."""
    from elastickv.recipe import DENSE, AttentionShape, Recipe, for_ratio

    batch, query_heads, kv_heads, head_dim, context = shape
    layer = AttentionShape(batch, query_heads, kv_heads, head_dim)
    text, _, budget = recipe_text.partition("@")
    named = DENSE if text == "dense" else None if budget else Recipe.parse(text)
    recipe = named or for_ratio(float(budget), context, layer)
    rng = np.random.default_rng(1)
    queries = rng.standard_normal((batch, query_heads, head_dim), dtype=np.float32)
    stored = 2 * 2 * batch * kv_heads * head_dim * context / 3
    copies = int(min(MOST_COPIES, max(2, -(-ROTATED_BYTES // stored))))
    caches = [backend.cache(layer, context, "bf16", recipe) for _ in range(copies)]
    for seed, cache in enumerate(caches):
        cache.fill_random(np.full(batch, context), seed)
    steps = -(-STEPS // copies) * copies
    programs = {"decode": (backend.attention(caches, [queries] * copies, steps, True), steps)}
    if recipe_text in CYCLED:
        try:
            feedback = import_module("elastickv.backends.feedback").Feedback
        except ModuleNotFoundError:  # trees before 0.2
            feedback = import_module("elastickv.attention.feedback").Feedback
        layers = [backend.cache(layer, context + CYCLE_ROOM, "bf16", recipe) for _ in range(CYCLE_LAYERS)]
        for seed, cache in enumerate(layers):
            cache.fill_random(np.full(batch, context), 100 + seed)
            cache.mark()
        programs["cycle"] = (backend.cycle(layers, queries, feedback.seeded(head_dim, 0, 1.0, 1.0, 1.0), True), CYCLE_LAYERS)
    return programs


def measured(workers, shape, recipe, pairs):
    """Return a row for each program of a cell: medians in microseconds, the ratio and its interval."""
    from elastickv.benchmark.stats.intervals import ratio_interval

    names, _ = (worker.ask(shape=shape, recipe=recipe)["programs"] for worker in workers)
    rows = []
    for name in names:
        launches = CYCLE_TOKENS if name == "cycle" else 1
        times = [[], []]
        for round_ in range(2 * pairs):
            for which in (0, 1) if round_ % 2 == 0 else (1, 0):
                answer = workers[which].ask(program=name, launches=launches)["us"]
                if round_ >= WARM_UP_ROUNDS:
                    times[which].append(float(np.median(answer)))
        ratio = ratio_interval(times[1], times[0])
        controls = [ratio_interval(series[::2], series[1::2]) for series in times]
        rows.append(
            {
                "shape": list(shape),
                "recipe": recipe,
                "program": name,
                "before_us": float(np.median(times[0])),
                "after_us": float(np.median(times[1])),
                "ratio": [ratio.estimate, ratio.low, ratio.high],
                "control": [[control.estimate, control.low, control.high] for control in controls],
                "samples_us": times,
            }
        )
        row = rows[-1]
        print(
            f"{','.join(map(str, shape)):24} {recipe:8} {name:6} {row['before_us']:9.2f} {row['after_us']:9.2f} us"
            f"  {ratio.estimate:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]",
            flush=True,
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="the src folder of the earlier tree")
    parser.add_argument("--before-revision", default="", help="what to call it in the record, such as a commit")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--shapes", help="batch,query heads,KV heads,head_dim,context; several apart by ';'")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), help="dense, recipes, or auto@C")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.backend)
        return 0
    if options.before is None or options.output is None or options.pairs < LEAST_PAIRS:
        parser.error(f"--before and --output are needed, and at least {LEAST_PAIRS} pairs")
    from suite import heading

    from elastickv.results.files import check_writable, write_text
    from elastickv.results.formats import dumps

    check_writable(options.output)
    start, rows = time.monotonic(), []
    workers = [Worker(source, "--backend", options.backend) for source in (options.before.resolve(), ROOT / "src")]
    shapes = [tuple(map(int, text.split(","))) for text in options.shapes.split(";")] if options.shapes else SHAPES
    for shape in shapes:
        for recipe in options.recipes:
            rows += measured(workers, shape, recipe, options.pairs)
            record = heading(KIND, VERSION, start) | {"before": options.before_revision, "pairs": options.pairs, "rows": rows}
            write_text(options.output, dumps(record))
    for worker in workers:
        worker.end()
    print(f"largest ratio {max(row['ratio'][0] for row in rows):.4f}, least {min(row['ratio'][0] for row in rows):.4f}")
    return 0


if __name__ == "__main__":
    exit_with(main)
