"""Measure the tasks of `elastickv eval` on a model, and write the result after every task and length.

    python benchmarks/tasks.py MODEL OUTPUT.json [--calibration FILE] [--compress 2,4,8] [--formats LIST] [--selections LIST]
        [--tasks all] [--lengths 4096] [--items 500] [--batch 32] [--minutes 8] [--dtype bf16] [--device cuda]

What is not finished after --minutes is left out, and `complete` is false: the task that runs is ended, and no other begun.
Run it again with the tasks that are missing for another file; `elastickv report` shows several.
"""

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import Any

from gpu_name import gpu_name

from elastickv.cli.progress import Bar
from elastickv.errors import UsageError
from elastickv.evaluation.evaluate import evaluate
from elastickv.evaluation.evaluation_options import EvaluationOptions
from elastickv.evaluation.kv_formats.published_formats import parse_formats
from elastickv.evaluation.kv_selections.published_selections import parse_selections
from elastickv.evaluation.tasks.task_registry import parse_tasks
from elastickv.evaluation.texts import evaluation_texts
from elastickv.recipe import ModelCalibration
from elastickv.results.formats import dumps, write_text
from elastickv.results.formats.fidelity_table import fidelity_tables
from elastickv.results.kinds.evaluation_result import EvaluationResult
from elastickv.transformers.model_loading import load_model


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--compress", default="2,4,8")
    parser.add_argument("--formats", action="append", default=[])
    parser.add_argument("--selections")
    parser.add_argument("--tasks", default="all")
    parser.add_argument("--lengths", default="4096")
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    ends = time.monotonic() + 60 * given.minutes
    calibration = None if given.calibration is None else ModelCalibration.load(given.calibration)
    ratios = tuple(map(float, given.compress.split(",")))
    result: dict[str, Any] | None = None
    complete = True

    def out_of_time(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, out_of_time)
    with Bar() as bar:
        bar.phase("loading")
        loaded = load_model(given.model, given.dtype, given.device)
        gpu = gpu_name() if loaded.model.device.type == "cuda" else {}
        for length in map(int, given.lengths.split(",")):
            for task in parse_tasks(given.tasks):
                left = ends - time.monotonic()
                if left <= 0:
                    complete = False
                    continue
                options = EvaluationOptions(
                    ratios, contexts=(), needle_lengths=(), greedy_tokens=0, formats=parse_formats(given.formats),
                    selections=parse_selections(given.selections), tasks=(task,), task_lengths=(length,),
                    task_items=given.items, task_batch=given.batch,
                )  # fmt: skip
                signal.setitimer(signal.ITIMER_REAL, left)
                try:
                    measured = evaluate(loaded, evaluation_texts(), options, calibration, bar)
                except (KeyboardInterrupt, UsageError) as error:
                    print(f"{task} at {length} tokens left out: {error or 'out of time'}", file=sys.stderr, flush=True)
                    complete = False
                    continue
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                if gpu:
                    measured["environment"]["gpu"] = gpu
                    measured["model"]["device_name"] = gpu["device"]
                result = joined(result, measured) | {"command": [*sys.argv]}
                write_text(given.output, dumps(result | {"complete": False}))
    if result is None:
        raise SystemExit("no task was finished")
    result |= {"complete": complete}
    write_text(given.output, dumps(result))
    print(fidelity_tables(EvaluationResult.from_dict(result)), flush=True)


def joined(before: dict[str, Any] | None, measured: dict[str, Any]) -> dict[str, Any]:
    """Return a result with the tasks of both, and the options of all."""
    if before is None:
        return measured
    options = before["options"] | {
        name: list(dict.fromkeys([*before["options"][name], *measured["options"][name]])) for name in ("tasks", "task_lengths")
    }
    tasks = [*before["tasks"], *measured["tasks"]]
    return before | {"options": options, "tasks": tasks, "seconds": before["seconds"] + measured["seconds"]}


if __name__ == "__main__":
    main()
