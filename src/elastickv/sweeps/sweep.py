"""`elastickv.sweep`: a sweep from Python."""

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elastickv.errors import UsageError
from elastickv.inputs import file_path
from elastickv.sweeps.journal import Journal
from elastickv.sweeps.plan import PRESETS, Cell, SweepPlan, merged, read_plan
from elastickv.sweeps.scheduler import Watcher, measure
from elastickv.sweeps.sweep_result import Sweep


class _Silent:
    def begin(self, done: int, total: int) -> None:
        pass

    def working(self, cell: Cell, phase: str, share: float) -> None:
        pass

    def finished(self, cell: Cell, status: str, reason: str | None) -> None:
        pass

    def left_out(self, device: int | None, reason: str) -> None:
        pass


def sweep(
    *,
    output: Path | str | None = None,
    plan: Path | str | None = None,
    preset: str | None = None,
    resume: bool = False,
    retry_failed: bool = False,
    devices: Sequence[int] | None = None,
    time_limit_s: float | None = None,
    watcher: Watcher | None = None,
    command: tuple[str, ...] = (),
    **axes_and_settings: Any,
) -> Sweep:
    """Measure every combination of axes, each with the paired sampler of `bench`.

    Parameters
    ----------
    output : file of the sweep, JSON Lines; None keeps it in memory only.
    plan : TOML or JSON file of axes and settings.
    preset : 'smoke' takes a minute; other axes and settings replace its values.
    resume : continue the sweep that `output` holds, if there is one.
    retry_failed : with `resume`, measure the failed cells again.
    devices : numbers of CUDA devices, one process each.
    time_limit_s : stop after this many seconds; what is measured by then stays.
    watcher : receives the progress.
    command : the command line, for the record.
    **axes_and_settings : axes (seq, batch, compress, recipe, heads, kv_heads, dim, dtype, cache, sinks, window, anchor_every),
        each a value, a list or a text such as '1-64*4'; what all cells share (backend, reps, warmup, inner_loops, seed, ...);
        baseline ('transformers', 'gguf' or both) and model (paths or hub ids), which add a cell for each pair.

    Raises
    ------
    UsageError : if an axis or a setting is unknown or out of range, or `output` holds another plan or cannot be written.
    DeviceFailure : if no device is left to measure on. What is measured by then is in `output`.
    """
    if preset is not None and preset not in PRESETS:
        raise UsageError(f"`preset` {preset} is unknown: choose {', '.join(PRESETS)}")
    if resume and output is None:
        raise UsageError("`resume=True` continues a file: give `output` too")
    if retry_failed and not resume:
        raise UsageError("`retry_failed=True` measures cells of a file again: give `resume=True` too")
    if time_limit_s is not None and not 0 < time_limit_s < float("inf"):
        raise UsageError(f"`time_limit_s`={time_limit_s} is out of range: give seconds above 0")
    chosen: list[int | None] = [None] if devices is None else list(devices)
    if not chosen or len(set(chosen)) < len(chosen):
        raise UsageError(f"`devices` {','.join(map(str, chosen))}: give each device once, at least one")
    requested = merged({} if plan is None else read_plan(file_path(plan)), axes_and_settings)
    planned = SweepPlan.of((PRESETS[preset] if preset else {}) | requested)
    if devices is not None and planned.settings.get("backend") == "cpu":
        raise UsageError("`devices` are GPUs: leave it out with `backend=cpu`")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "sweep.jsonl") if output is None else file_path(output)
        with Journal(path, planned, resume, command, retry_failed) as journal:
            if journal.other_version is not None:
                warnings.warn(
                    f"{path} was begun at commit {journal.other_version}: its cells are of two versions", stacklevel=2
                )
            measure(planned, journal, watcher or _Silent(), chosen, time_limit_s, command)
        return Sweep.load(path)
