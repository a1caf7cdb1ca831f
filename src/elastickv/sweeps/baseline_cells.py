"""Baselines as cells of a sweep: one for each program and model, beside the grid of the others."""

from collections.abc import Mapping
from itertools import product
from typing import Any

from elastickv.benchmark.reporter import Reporter
from elastickv.errors import UsageError
from elastickv.sweeps.axes import listed

PROGRAMS = ("transformers", "gguf")
AXES = ("program", "model")
NAMES = ("baseline", "model")


def cells(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a cell for each program and model that `baseline` and `model` name; none without both.

    Raises
    ------
    UsageError : if one is set without the other, or a program is unknown.
    """
    programs, models = (listed(name, plan[name]) if name in plan else [] for name in NAMES)
    if bool(programs) != bool(models):
        missing, there = ("model", "baseline") if programs else ("baseline", "model")
        raise UsageError(f"`{there}` is given without `{missing}`: give both, as `baseline={','.join(PROGRAMS)}` `model=PATH`")
    for program in programs:
        if program not in PROGRAMS:
            raise UsageError(f"`baseline` {program} is unknown: choose {', '.join(PROGRAMS)}")
    return [dict(zip(AXES, point, strict=True)) for point in product(programs, models)]


def is_baseline(cell: Mapping[str, Any]) -> bool:
    """Whether a cell is a baseline."""
    return "program" in cell


def request(cell: Mapping[str, Any], settings: Mapping[str, Any], device: int | None) -> dict[str, Any]:
    """Return the inputs of the measuring process: the cell, and the shared settings that `elastickv baseline` takes."""
    inputs = {"program": cell["program"], "model": cell["model"]}
    inputs |= {name: settings[name] for name in ("reps", "decode_tokens", "seed") if name in settings}
    if cell["program"] == "transformers":
        inputs["device"] = "cpu" if settings.get("backend") == "cpu" else None if device is None else f"cuda:{device}"
    return inputs


def measured(inputs: Mapping[str, Any], command: tuple[str, ...], reporter: Reporter) -> dict[str, Any]:
    """Return the result of measuring the inputs that `request` made.

    Raises
    ------
    UsageError : as `elastickv baseline` does.
    """
    from elastickv.model_benchmark.presets import gguf_baseline, transformers_baseline

    options = {name: value for name, value in inputs.items() if name != "program"}
    if inputs["program"] == "gguf":
        return gguf_baseline(**options, command=command, progress=reporter)
    return transformers_baseline(**options, command=command, progress=reporter)
