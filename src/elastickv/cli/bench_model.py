"""`elastickv bench --model`: what the command does when it is given a model."""

from pathlib import Path
from typing import Any

import click

from elastickv.errors import UsageError

# Options of `bench` that mean something with a model; the others are refused rather than ignored.
_USED = (
    "model", "seq", "batch", "compress", "recipe", "calibration", "dtype", "backend", "device", "reps", "decode_tokens", "seed",
    "temperature", "no_graphs", "output", "format_", "json_",
)  # fmt: skip
_DEFAULTS = {"seq": 4096, "compress": 4.0, "reps": 8, "decode_tokens": 32}
_FORMATS = ("table", "json")


def run_model_bench(given: dict[str, Any], command: tuple[str, ...]) -> int:
    """Measure a model with stock and elastic caches and print the result."""
    from elastickv.cli.output import shown_after
    from elastickv.cli.progress import Bar
    from elastickv.cli.run import quiet_transformers
    from elastickv.reports import plain_json
    from elastickv.reports.files import check_writable, write_text
    from elastickv.reports.generation_table import generation_table
    from elastickv.transformers.models import NEEDED, require

    typed = _typed(given)
    if stray := sorted(name for name in typed if name not in _USED):
        raise UsageError(f"--{stray[0].replace('_', '-')} says nothing about a model: leave it out with --model")
    shown = _shown(given)
    require(*NEEDED)
    output: Path | None = given["output"]
    if output is not None:
        check_writable(output)
    from elastickv.fidelity.texts import calibration_text
    from elastickv.recipe import ModelCalibration
    from elastickv.transformers.speed.model_bench import ModelBench, measure
    from elastickv.transformers.speed.shapes import usual_device, usual_dtype

    filled = given | {name: value for name, value in _DEFAULTS.items() if name not in typed}
    recipe = given["recipe"] if "recipe" in typed and given["recipe"] != "auto" else None
    compress = given["compress"] if "compress" in typed or recipe is not None else filled["compress"]
    device = {"auto": usual_device(), "cpu": "cpu", "cuda": f"cuda:{given['device'] or 0}"}.get(given["backend"])
    if device is None:
        raise UsageError(f"--backend={given['backend']} is unknown: choose auto, cuda, cpu")
    if device.startswith("cuda") and usual_device() != "cuda":
        raise UsageError("--backend=cuda: PyTorch finds no CUDA device; leave the option out to run on the CPU")
    calibration = None if given["calibration"] is None else ModelCalibration.load(given["calibration"])
    options = ModelBench(
        model=given["model"],
        context=filled["seq"],
        batch=given["batch"],
        rounds=filled["reps"],
        tokens=filled["decode_tokens"],
        wanted={"compress": compress, "recipe": recipe, "calibration": calibration, "capture": not given["no_graphs"]},
        dtype=given["dtype"] if "dtype" in typed else usual_dtype(device),
        device=device,
        seed=given["seed"],
        temperature=given["temperature"] or 0.0,
        text=calibration_text().content,
    )
    with Bar() as bar, quiet_transformers():
        result = measure(options, command, bar)
    written = plain_json.dumps(result)
    with shown_after(written if shown == "json" else generation_table(result)):
        if output is not None:
            write_text(output, written)
    return 0


def _typed(given: dict[str, Any]) -> set[str]:
    """Return the names of the options that were given, by whatever way."""
    context = click.get_current_context()
    return {name for name in given if context.get_parameter_source(name) != click.core.ParameterSource.DEFAULT}


def _shown(given: dict[str, Any]) -> str:
    shown = given["format_"] or ("json" if given["json_"] else "table")
    if shown not in _FORMATS:
        raise UsageError(f"--format {shown}: a model's result is shown as {' or '.join(_FORMATS)}")
    return str(shown)
