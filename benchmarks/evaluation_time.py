"""Where the time of `elastickv calibrate` and `elastickv eval` goes: seconds of each phase, and where the host was in it.

    python benchmarks/evaluation_time.py [--model MODEL] [--device cuda] [--dtype bf16] [--time-limit 230] --output FILE

Loads a model (a folder, a .gguf file, or random weights as `shape:0.5b`), calibrates it on the command's default text and
evaluates it with the command's defaults. The file is written after every phase; at the time limit the phase that runs is left
out. A thread looks every 10 ms at what the host runs: shares are of its looks, by the innermost function of ElasticKV.
"""

import argparse
import json
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from command_line import exit_with

STARTED = time.monotonic()
EVERY_S = 0.01
SHOWN = 8


class Clock:
    """Times phases; the reporter of an evaluation. Samples the main thread in the background."""

    def __init__(self, output: Path, about: dict[str, Any]) -> None:
        self._output, self.about = output, about
        self._phases: list[dict[str, Any]] = []
        self._main = threading.main_thread().ident
        self._looks: Counter[str] = Counter()
        self._name, self._began, self._steps = "starting", STARTED, 0
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    def phase(self, name: str) -> None:
        """End a phase and begin another."""
        now = time.monotonic()
        looks, self._looks = self._looks, Counter()
        total = max(1, looks.total())
        host = {where: round(count / total, 3) for where, count in looks.most_common(SHOWN)}
        ended = {"phase": self._name, "seconds": round(now - self._began, 3), "steps": self._steps, "host": host}
        self._phases.append(ended)
        print(f"{ended['seconds']:8.2f} s  {self._name}  {dict(list(host.items())[:3])}", flush=True)
        self._name, self._began, self._steps = name, now, 0
        record = self.about | {"seconds": round(now - STARTED, 3), "phases": self._phases}
        self._output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def stop(self) -> None:
        """End the sampling: a thread that runs while the interpreter ends can abort it."""
        self._ended.set()
        self._sampler.join()

    def progress(self, done: int, total: int) -> None:
        """Count steps."""
        self._steps = done

    def seconds(self, *parts: str) -> float:
        """Return the seconds of the phases whose names contain one of some parts."""
        return sum(one["seconds"] for one in self._phases if any(part in one["phase"] for part in parts))

    def _sample(self) -> None:
        while not self._ended.wait(EVERY_S):
            frame = sys._current_frames().get(self._main or 0)
            leaf = frame and frame.f_code.co_name
            while frame and "elastickv" not in frame.f_code.co_filename:
                frame = frame.f_back
            if frame:
                code = frame.f_code
                self._looks[f"{Path(code.co_filename).stem}.{code.co_name} > {leaf}"] += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="shape:0.5b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--time-limit", type=float, default=230.0, help="seconds")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    clock = Clock(arguments.output, {name: str(getattr(arguments, name)) for name in ("model", "device", "dtype")})
    clock.phase("importing")
    import torch
    import transformers

    import elastickv
    from elastickv.benchmark.environment import environment
    from elastickv.evaluation.calibrate import DEFAULT_TOKENS, calibrate
    from elastickv.evaluation.evaluate import evaluate
    from elastickv.evaluation.evaluation_options import EvaluationOptions
    from elastickv.evaluation.texts import calibration_text, evaluation_texts
    from elastickv.model_benchmark.model_source import open_model

    if arguments.device.startswith("cuda"):
        clock.about["device_name"] = torch.cuda.get_device_name(arguments.device)
    versions = {package.__name__: package.__version__ for package in (elastickv, torch, transformers)}
    clock.about |= {"versions": versions} | {name: environment()[name] for name in ("date_utc", "commit")}

    def wait() -> None:
        if arguments.device.startswith("cuda"):
            torch.cuda.synchronize()

    # A phase ends with an interrupt, as at Ctrl-C: what was measured by then stays.
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, arguments.time_limit - (time.monotonic() - STARTED)))
    complete = False
    try:
        clock.phase("loading")
        loaded = open_model(arguments.model).load(arguments.dtype, arguments.device)
        wait()
        clock.phase("calibrating")
        calibration = calibrate(loaded, calibration_text(), DEFAULT_TOKENS, clock.progress)
        wait()
        complete = evaluate(loaded, evaluation_texts(), EvaluationOptions(), calibration, clock)["complete"]
        wait()
    except KeyboardInterrupt:
        pass
    signal.setitimer(signal.ITIMER_REAL, 0)
    clock.about["complete"] = complete
    clock.phase("end")
    clock.stop()
    whole = time.monotonic() - STARTED
    starting = clock.seconds("starting", "importing", "loading")
    print(f"start {starting:.1f} s; calibration {clock.seconds('calibrating'):.1f} s; ", end="")
    rest = whole - starting - clock.seconds("calibrating")
    print(f"evaluation {rest:.1f} s{'' if complete else ', cut off at the time limit'}", flush=True)
    return 0 if complete else 1


if __name__ == "__main__":
    exit_with(main)
