"""`elastickv.bench` and `elastickv.load`: measurements from Python."""

import os
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from elastickv.benchmark import PRESETS, Gate, Options, Reporter, run
from elastickv.benchmark.option_types import TYPES, typed
from elastickv.benchmark.runner import Silent
from elastickv.errors import UsageError
from elastickv.inputs import file_path
from elastickv.results.documents import documents
from elastickv.results.measurement import Measurement
from elastickv.sweeps.sweep_result import Sweep

if TYPE_CHECKING:
    from elastickv.recipe import ModelCalibration

# Options that mean something with a model; the others are refused rather than ignored.
_OF_A_MODEL = (
    "seq", "batch", "compress", "recipe", "dtype", "backend", "device", "reps", "decode_tokens", "seed", "graphs",
)  # fmt: skip
_MODEL_DEFAULTS = {"seq": 4096, "compress": 4.0, "reps": 8, "decode_tokens": 32}


def bench(
    *,
    preset: str | None = None,
    gate: str | None = None,
    model: Path | str | None = None,
    calibration: "ModelCalibration | Path | str | None" = None,
    temperature: float | None = None,
    reporter: Reporter | None = None,
    command: tuple[str, ...] = (),
    **options: Any,
) -> Measurement:
    """Measure decode attention at 1/C of the KV bytes against a dense baseline, as `elastickv bench` does.

    Parameters
    ----------
    preset : 'long' or 'short', the original's workloads; what is given beside it replaces its own.
    gate : 'golden', or bounds such as 'speedup>=1.5,cv<=5'; the verdict is in the result.
    model : measure this model's tokens/s end to end instead: a folder, a .gguf file, a hub id, or a shape such as 'shape:8b'.
    calibration : with `model`, what `elastickv calibrate` wrote.
    temperature : with `model`, 0 takes the likeliest token.
    reporter : told what is going on.
    command : what was typed, for the record.
    **options : seq, batch, heads, kv_heads, dim, compress, recipe, dtype, paired, reps, inference, backend, seed, ...: the
        attributes of `elastickv.benchmark.Options`. None leaves one out. With `model` only seq, batch, compress, recipe, dtype,
        backend, device, reps, decode_tokens, seed and graphs; there seq is 4096 unless given, compress 4 (none with a recipe),
        reps 8, decode_tokens 32 and dtype bf16 on CUDA, fp32 on a CPU.

    Raises
    ------
    UsageError : if something given is unknown, out of range, or cannot be met on this machine.
    KernelMismatch, NonFiniteError : if a figure would be wrong.
    KeyboardInterrupt : if interrupted before anything was measured; later, the result is marked incomplete.
    """
    asked = {name: value for name, value in options.items() if value is not None}
    if unknown := [name for name in asked if name not in TYPES]:
        raise UsageError(f"--{unknown[0].replace('_', '-')} is unknown: options are {', '.join(TYPES)}")
    asked = {name: typed(name, value) for name, value in asked.items()}
    if model is not None:
        if not isinstance(model, (str, Path)):
            raise UsageError(f"model {model!r} is no name: give a folder, a .gguf file, a hub id or a shape such as shape:8b")
        stray = [*(name for name in asked if name not in _OF_A_MODEL), *["preset"] * bool(preset), *["gate"] * bool(gate)]
        if stray:
            raise UsageError(f"--{min(stray).replace('_', '-')} says nothing about a model: leave it out with --model")
        return _model_bench(str(model), asked, calibration, temperature or 0.0, reporter or Silent(), command)
    for name, value in (("calibration", calibration), ("temperature", temperature)):
        if value is not None:
            raise UsageError(f"--{name} is of a model: give --model too")
    if preset is not None and preset not in PRESETS:
        raise UsageError(f"--preset {preset} is unknown: choose {', '.join(PRESETS)}")
    base: dict[str, Any] = dict(PRESETS[preset]) if preset else {}
    if not isinstance(gate, (str, NoneType)):
        raise UsageError(f"gate {gate!r} is no text: give golden, or bounds such as speedup>=1.5,cv<=5")
    parsed = None if gate is None else Gate.parse(gate)
    return Measurement(run(Options(**base | asked, gate=parsed, command=command), reporter).as_dict())


def load(path: Path | str) -> Measurement | Sweep:
    """Return what a file holds: one result of `bench`, or a sweep.

    Raises
    ------
    UsageError : naming the file, if it cannot be read or holds something else.
    """
    path = file_path(path)
    if os.path.isdir(path):
        raise UsageError(f"{path} is a folder: give one file; `elastickv.compare` takes folders")
    first = next(documents(path, [])).value
    return Sweep.load(path) if isinstance(first, dict) and "sweep" in first else Measurement.load(path)


def _model_bench(
    model: str,
    asked: dict[str, Any],
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

    filled = _MODEL_DEFAULTS | asked
    recipe = None if asked.get("recipe", "auto") == "auto" else asked["recipe"]
    backend = asked.get("backend", "auto")
    device = {"auto": usual_device(), "cpu": "cpu", "cuda": f"cuda:{asked.get('device', 0)}"}.get(backend)
    if device is None:
        raise UsageError(f"--backend={backend} is unknown: choose auto, cuda, cpu")
    if device.startswith("cuda") and usual_device() != "cuda":
        raise UsageError("--backend=cuda: PyTorch finds no CUDA device; leave the option out to run on the CPU")
    if isinstance(calibration, (str, Path)):
        calibration = ModelCalibration.load(Path(calibration))
    options = ModelBench(
        model=model,
        context=filled["seq"],
        batch=asked.get("batch", 1),
        rounds=filled["reps"],
        tokens=filled["decode_tokens"],
        wanted={
            "compress": asked.get("compress") if recipe is not None else filled["compress"],
            "recipe": recipe,
            "calibration": calibration,
            "capture": asked.get("graphs", True),
        },
        dtype=asked.get("dtype", usual_dtype(device)),
        device=device,
        seed=asked.get("seed", 0),
        temperature=temperature,
        text=calibration_text().content,
    )
    return Measurement(measure(options, command, reporter))
