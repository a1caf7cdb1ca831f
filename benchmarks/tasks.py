"""Measure the tasks of `elastickv eval` on a model at one length or several, and write the result after every task.

    python benchmarks/tasks.py MODEL OUTPUT.json [--calibration FILE] [--compress 2,4,8] [--formats LIST] [--selections LIST]
        [--tasks all] [--lengths 4096] [--items 500] [--batch 125] [--minutes 8] [--processes 1] [--dtype bf16] [--device cuda]

What is not finished after --minutes is left out, and `complete` is false: the task that runs is ended, and no other begun. A
further call with the same options measures what the file lacks. Several --processes share the tasks and the GPU: one draws
items and launches kernels while the kernels of another run. Each writes OUTPUT-part-N.json, and OUTPUT has them all.
"""

import argparse
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command_line import exit_with
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
from elastickv.results.documents import parse_json
from elastickv.results.files import write_text
from elastickv.results.formats import plain_json
from elastickv.results.formats.fidelity_table import fidelity_tables
from elastickv.results.kinds.evaluation_result import EvaluationResult
from elastickv.transformers.model_loading import load_model

Piece = tuple[str, int]
"""A task and a length."""
Result = dict[str, Any]


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
    parser.add_argument("--batch", type=int, default=125)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


@dataclass(frozen=True)
class Plan:
    """What is measured, where it is written, and by when."""

    given: argparse.Namespace
    pieces: list[Piece]
    ends: float

    @classmethod
    def of(cls, given: argparse.Namespace) -> "Plan":
        pieces = [(task, length) for length in map(int, given.lengths.split(",")) for task in parse_tasks(given.tasks)]
        return cls(given, pieces, time.monotonic() + 60 * given.minutes)

    @property
    def parts(self) -> list[Path]:
        """The files of the processes, as many as there are."""
        return sorted(self.given.output.parent.glob(f"{self.given.output.stem}-part-*.json"))

    def options(self, task: str, length: int) -> EvaluationOptions:
        """Return the options of an evaluation of one task."""
        given = self.given
        return EvaluationOptions(
            tuple(map(float, given.compress.split(","))), contexts=(), needle_lengths=(), greedy_tokens=0,
            formats=parse_formats(given.formats), selections=parse_selections(given.selections),
            tasks=(task,), task_lengths=(length,), task_items=given.items, task_batch=given.batch,
        )  # fmt: skip

    def measured(self) -> Result | None:
        """Return what the files have, if it was measured in the same way."""
        result = None
        for path in [self.given.output, *self.parts]:
            if path.exists():
                record = parse_json(path.read_text(encoding="utf-8"))
                if self._alike(record):
                    result = joined(result, record)
                else:
                    print(f"{path.name} was measured in another way: it is measured anew", file=sys.stderr, flush=True)
        return result

    def _alike(self, record: Result) -> bool:
        asked, given, calibration = self.options("", 0), self.given, record["calibration"]
        options = [[*asked.ratios], [*asked.formats], [*asked.selections], asked.task_items]
        return (
            [record["options"][name] for name in ("ratios", "formats", "selections", "task_items")] == options
            and record["model"]["name"] == Path(given.model).name
            and record["model"]["dtype"] == given.dtype
            and record["model"]["device"].partition(":")[0] == given.device.partition(":")[0]
            and (calibration is None) == (given.calibration is None)
        )

    def missing(self, result: Result | None) -> list[Piece]:
        """Return the tasks that a result lacks."""
        done = [(row["task"], row["tokens"]) for row in result["tasks"]] if result else []
        return [piece for piece in self.pieces if piece not in done]

    def write(self, result: Result, path: Path) -> None:
        """Write a result with its tasks in the order that was asked for."""
        order = {piece: place for place, piece in enumerate(self.pieces)}
        tasks = sorted(result["tasks"], key=lambda row: order.get((row["task"], row["tokens"]), len(order)))
        result |= {"tasks": tasks, "complete": not self.missing(result), "command": [*sys.argv]}
        write_text(path, plain_json.dumps(result))


def measure(plan: Plan, result: Result | None) -> Result | None:
    """Measure what a result lacks, and write it after every task."""
    given = plan.given
    calibration = None if given.calibration is None else ModelCalibration.load(given.calibration)

    def out_of_time(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, out_of_time)
    with Bar() as bar:
        bar.phase("loading")
        loaded = load_model(given.model, given.dtype, given.device)
        gpu = gpu_name() if loaded.model.device.type == "cuda" else {}
        for task, length in plan.missing(result):
            left = plan.ends - time.monotonic()
            if left <= 0:
                break
            signal.setitimer(signal.ITIMER_REAL, left)
            try:
                measured = evaluate(loaded, evaluation_texts(), plan.options(task, length), calibration, bar)
            except KeyboardInterrupt:
                break
            except UsageError as error:
                print(f"{task} at {length} tokens left out: {error}", file=sys.stderr, flush=True)
                continue
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            if gpu:
                measured["environment"]["gpu"] = gpu
                measured["model"]["device_name"] = gpu["device"]
            result = joined(result, measured)
            plan.write(result, given.output)
            row = measured["tasks"][0]
            scores = ", ".join(f"{one['cache']} {one['score_percent']['mean']:.1f}" for one in row["caches"])
            print(f"{task} at {length} tokens: {scores}  ({row['seconds']:.1f} s)", flush=True)
    return result


def share(plan: Plan, pieces: list[Piece]) -> None:
    """Measure tasks in several processes; each writes a file of its own."""
    given, processes = plan.given, []
    for number in range(min(given.processes, len(pieces))):
        own = pieces[number :: given.processes]
        # A process measures the product of its tasks and its lengths.
        for length in dict.fromkeys(length for _, length in own):
            tasks = ",".join(task for task, of_length in own if of_length == length)
            part = given.output.with_name(f"{given.output.stem}-part-{number}-{length}.json")
            command = [sys.executable, __file__, given.model, str(part), "--tasks", tasks, "--lengths", str(length)]
            command += ["--compress", given.compress, "--items", str(given.items), "--batch", str(given.batch)]
            command += ["--minutes", str((plan.ends - time.monotonic()) / 60), "--dtype", given.dtype, "--device", given.device]
            command += [word for text in given.formats for word in ("--formats", text)]
            command += ["--selections", given.selections] if given.selections else []
            command += ["--calibration", str(given.calibration)] if given.calibration else []
            processes.append(subprocess.Popen(command))
    for process in processes:
        process.wait()


def joined(before: Result | None, measured: Result) -> Result:
    """Return a result with the tasks of both, each once, and the options of all."""
    if before is None:
        return measured
    options = before["options"] | {
        name: list(dict.fromkeys([*before["options"][name], *measured["options"][name]])) for name in ("tasks", "task_lengths")
    }
    have = {(row["task"], row["tokens"]) for row in before["tasks"]}
    new = [row for row in measured["tasks"] if (row["task"], row["tokens"]) not in have]
    seconds = before["seconds"] + sum(row["seconds"] for row in new)
    return before | {"options": options, "tasks": [*before["tasks"], *new], "seconds": seconds}


def main() -> int:
    plan = Plan.of(arguments())
    given, result = plan.given, plan.measured()
    if (missing := plan.missing(result)) and given.minutes > 0:
        if given.processes > 1:
            share(plan, missing)
            result = plan.measured()
        else:
            result = measure(plan, result)
    if result is None:
        raise SystemExit("no task was finished")
    plan.write(result, given.output)
    for path in plan.parts:
        path.unlink()
    for task, length in (missing := plan.missing(result)):
        print(f"{task} at {length} tokens is missing: call it again to measure it", file=sys.stderr)
    print(fidelity_tables(EvaluationResult.from_dict(result)), flush=True)
    return 1 if missing else 0


if __name__ == "__main__":
    exit_with(main)
