"""The five public functions: bench, sweep, compare, report, load."""

import os
import time
import warnings
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from elastickv.benchmark.gate import Gate
from elastickv.benchmark.model_options import ModelOptions, requested_compress
from elastickv.benchmark.option_types import typed
from elastickv.benchmark.options import PRESETS, TYPES, Options, defaults_of
from elastickv.benchmark.reporter import Reporter, SilentReporter
from elastickv.benchmark.runner import run
from elastickv.errors import UsageError
from elastickv.html_report.report import report
from elastickv.inputs import file_path
from elastickv.results.compare.comparison import compare
from elastickv.results.documents import documents
from elastickv.results.measurement import Measurement
from elastickv.sweeps.sweep import sweep
from elastickv.sweeps.sweep_result import Sweep

if TYPE_CHECKING:
    from elastickv.recipe import ModelCalibration

__all__ = ["bench", "compare", "load", "report", "sweep"]


def bench(
    *,
    preset: str | None = None,
    gate: str | None = None,
    model: Path | str | None = None,
    calibration: "ModelCalibration | Path | str | None" = None,
    temperature: float | None = None,
    reporter: Reporter | None = None,
    command: tuple[str, ...] = (),
    started: float | None = None,
    **options: Any,
) -> Measurement:
    """Measure decode attention at 1/C of the KV bytes against a dense baseline, as `elastickv bench` does.

    Parameters
    ----------
    preset : 'long' or 'short', the original's workloads; other options replace its values.
    gate : 'golden', or bounds such as 'speedup>=1.5,cv<=5'; the verdict is in the result.
    model : measure this model's tokens/s end to end instead: a folder, a .gguf file, a hub id, or a shape such as 'shape:8b'.
    calibration : with `model`, the file of `elastickv calibrate`.
    temperature : with `model`, 0 takes the likeliest token.
    reporter : receives phases and progress.
    command : the command line, for the record.
    started : reading of `time.monotonic` from which `time_limit_s` counts; None is the call of this function.
    **options : seq, batch, heads, kv_heads, dim, compress, recipe, dtype, paired, reps, inference, backend, seed, ...: the
        attributes of `elastickv.benchmark.Options`. None leaves one out. With `model` only seq, batch, compress, recipe, dtype,
        backend, device, reps, decode_tokens, seed and graphs, with the defaults of
        `elastickv.benchmark.model_options.ModelOptions`, which `elastickv bench --help` shows.

    Raises
    ------
    UsageError : if an option is unknown, out of range, or cannot be met on this machine.
    KernelMismatch, NonFiniteError : if a result would be wrong.
    KeyboardInterrupt : if interrupted before anything was measured; later, the result is marked incomplete.
    """
    started = time.monotonic() if started is None else started
    requested = {name: value for name, value in options.items() if value is not None}
    if unknown := [name for name in requested if name not in TYPES]:
        raise UsageError(f"`{unknown[0]}` is unknown: options are {', '.join(TYPES)}")
    requested = {name: typed(name, value) for name, value in requested.items()}
    if model is not None:
        if not isinstance(model, (str, Path)):
            raise UsageError(f"model {model!r} is no name: give a folder, a .gguf file, a hub id or a shape such as shape:8b")
        others = [name for name in requested if name not in defaults_of(ModelOptions)]
        others += [name for name, value in (("preset", preset), ("gate", gate)) if value]
        if others:
            raise UsageError(f"`{min(others)}` says nothing about a model: leave it out with `model`")
        return _model_bench(str(model), requested, calibration, temperature or 0.0, reporter or SilentReporter(), command)
    for name, value in (("calibration", calibration), ("temperature", temperature)):
        if value is not None:
            raise UsageError(f"`{name}` is of a model: give `model` too")
    if preset is not None and preset not in PRESETS:
        raise UsageError(f"`preset` {preset} is unknown: choose {', '.join(PRESETS)}")
    base: dict[str, Any] = dict(PRESETS[preset]) if preset else {}
    if not isinstance(gate, (str, NoneType)):
        raise UsageError(f"gate {gate!r} is no text: give golden, or bounds such as speedup>=1.5,cv<=5")
    parsed = None if gate is None else Gate.parse(gate)
    return Measurement(run(Options(**base | requested, gate=parsed, command=command), reporter, started).as_dict())


def load(path: Path | str) -> Measurement | Sweep:
    """Return the content of a file: one result of `bench`, `run` or `baseline`, or a sweep.

    A sweep that lacks cells of its plan is returned with a warning that counts and names them.

    Raises
    ------
    UsageError : naming the file, if it cannot be read or holds something else.
    """
    path = file_path(path)
    if os.path.isdir(path):
        raise UsageError(f"{path} is a folder: give one file; `elastickv.compare` takes folders")
    first = next(documents(path, [])).value
    if not (isinstance(first, dict) and "sweep" in first):
        return Measurement.load(path)
    loaded = Sweep.load(path)
    if not loaded.complete:
        warnings.warn(loaded.missing.sentence(str(path)), stacklevel=2)
    return loaded


def _model_bench(
    model: str,
    requested: dict[str, Any],
    calibration: "ModelCalibration | Path | str | None",
    temperature: float,
    reporter: Reporter,
    command: tuple[str, ...],
) -> Measurement:
    from elastickv.transformers.model_loading import NEEDED, require

    require(*NEEDED)
    from elastickv.evaluation.texts import calibration_text
    from elastickv.model_benchmark.bench import ModelBench, measure
    from elastickv.model_benchmark.shapes import usual_device, usual_dtype
    from elastickv.recipe import ModelCalibration

    options = ModelOptions(**requested)
    recipe = None if options.recipe == "auto" else options.recipe
    device = {"auto": usual_device(), "cpu": "cpu", "cuda": f"cuda:{options.device or 0}"}.get(options.backend)
    if device is None:
        raise UsageError(f"`backend`={options.backend} is unknown: choose auto, cuda, cpu")
    if device.startswith("cuda") and usual_device() != "cuda":
        raise UsageError("`backend`=cuda: PyTorch finds no CUDA device; leave the option out to run on the CPU")
    if isinstance(calibration, (str, os.PathLike)):
        calibration = ModelCalibration.load(calibration)
    inputs = ModelBench(
        model=model,
        context=options.seq,
        batch=options.batch,
        rounds=options.reps,
        tokens=options.decode_tokens,
        wanted={
            "compress": requested_compress(requested.get("compress"), recipe, options.compress),
            "recipe": recipe,
            "calibration": calibration,
            "capture": options.graphs,
        },
        dtype=options.dtype or usual_dtype(device),
        device=device,
        seed=options.seed,
        temperature=temperature,
        text=calibration_text().content,
    )
    return Measurement(measure(inputs, command, reporter))
