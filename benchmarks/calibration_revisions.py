"""Compare the time that two source trees take to calibrate a model, and their results, in one run.

    git worktree add /tmp/before REVISION
    python benchmarks/calibration_revisions.py --before /tmp/before/src --model MODEL.gguf \
        --output benchmarks/results/cpu/calibration-revisions.json

Each tree calibrates in a process of its own that has loaded the model before; runs alternate in mirrored order (before, after,
after, before). CPU seconds count the time of all threads and change less than wall time where other programs run. Errors of the
two results are compared one by one: files hold six digits.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from command_line import exit_with
from revisions import ROOT, Worker

KIND, VERSION = "elastickv-calibration-revisions", 1
TABLES = ("pages", "keys", "values")


def serve(model):
    """Calibrate whenever a line of standard input says on how many tokens, with whichever `elastickv` PYTHONPATH leads to."""
    from elastickv.evaluation.calibrate import calibrate
    from elastickv.evaluation.texts import calibration_text
    from elastickv.transformers.model_loading import load_model

    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr
    loaded = load_model(model)
    for line in sys.stdin:
        wall, cpu = time.monotonic(), time.process_time()
        result = calibrate(loaded, calibration_text(), json.loads(line)["tokens"])
        seconds = {"wall_s": time.monotonic() - wall, "cpu_s": time.process_time() - cpu}
        answers.write(json.dumps(seconds | {"result": result.dumps()}) + "\n")
        answers.flush()


def numbers(value):
    """Return the numbers of a JSON value in order."""
    if isinstance(value, dict):
        value = list(value.values())
    return [number for item in value for number in numbers(item)] if isinstance(value, list) else [float(value)]


def largest_difference(before, after):
    """Return the largest relative difference between the errors of two calibrations, and how many errors there are."""
    a, b = (np.array(numbers([json.loads(text)[table] for table in TABLES])) for text in (before, after))
    return float((np.abs(a - b) / np.maximum(np.abs(a), np.finfo(float).tiny)).max()), len(a)


def measured(workers, tokens, pairs):
    """Yield the times and the largest difference after each pair of runs."""
    runs = [[], []]
    for pair in range(pairs):
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            runs[which].append(workers[which].ask(tokens=tokens))
        difference, errors = largest_difference(*(series[-1]["result"] for series in runs))
        row = {"tokens": tokens, "errors": errors, "largest_relative_difference": difference}
        for clock in ("wall_s", "cpu_s"):
            before, after = ([run[clock] for run in series] for series in runs)
            row[clock] = {"before": before, "after": after, "ratio": float(np.median(np.array(after) / np.array(before)))}
        print(json.dumps(row), flush=True)
        yield row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="the src folder of the earlier tree")
    parser.add_argument("--before-revision", default="", help="what to call it in the record, such as a commit")
    parser.add_argument("--model", required=True, help="a folder, a .gguf file or a hub id")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.model)
        return 0
    if options.before is None or options.output is None or options.pairs < 1:
        parser.error("--before and --output are needed, and at least one pair")
    from suite import heading

    from elastickv.results.files import check_writable, write_text
    from elastickv.results.formats import dumps

    check_writable(options.output)
    start = time.monotonic()
    sources = (options.before.resolve(), ROOT / "src")
    workers = [Worker(source, "--model", options.model, script=__file__) for source in sources]
    for row in measured(workers, options.tokens, options.pairs):
        record = heading(KIND, VERSION, start) | {"before": options.before_revision, "model": Path(options.model).name}
        # The command names files of this machine only.
        record["command"] = ["python", "benchmarks/calibration_revisions.py", "--tokens", str(options.tokens)]
        write_text(options.output, dumps(record | row))
    for worker in workers:
        worker.end()
    return 0


if __name__ == "__main__":
    exit_with(main)
