"""The two baselines with their default sizes, for the command line, sweeps and the notebook."""

from pathlib import Path
from typing import Any

from elastickv.benchmark.model_options import GgufBaselineOptions, TransformersBaselineOptions, requested_compress
from elastickv.benchmark.reporter import Reporter, SilentReporter
from elastickv.errors import UsageError
from elastickv.evaluation.texts import evaluation_texts

_STOCK, _GGUF = TransformersBaselineOptions(), GgufBaselineOptions()


def transformers_baseline(
    model: str,
    *,
    context: int = _STOCK.context,
    compress: float | None = None,
    recipe: str | None = None,
    calibration: Path | None = None,
    reps: int = _STOCK.reps,
    decode_tokens: int = _STOCK.decode_tokens,
    scored: int = _STOCK.scored,
    dtype: str | None = None,
    device: str | None = None,
    seed: int = _STOCK.seed,
    command: tuple[str, ...] = (),
    progress: Reporter | None = None,
) -> dict[str, Any]:
    """Measure a model's speed with stock and elastic caches, and the quality of its predictions with the elastic one.

    Parameters
    ----------
    model : a directory, a .gguf file, a hub id or 'shape:tiny' and its like.
    compress, recipe : of the elastic cache; compress defaults to 2 without a recipe.
    reps, decode_tokens : samples per cache, and decodes per sample.
    scored : number of predictions to compare with those of full attention; 0 skips them.

    Raises
    ------
    UsageError : if a package is missing, an option is out of range, or the model is not supported.
    """
    from elastickv.transformers.model_loading import NEEDED, require

    require(*NEEDED)
    from elastickv.model_benchmark.bench import ModelBench, measure_with_quality
    from elastickv.model_benchmark.shapes import usual_device, usual_dtype
    from elastickv.recipe import ModelCalibration

    place = device or usual_device()
    if place.partition(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"`device`={place} is unknown: choose cpu or cuda")
    if place.startswith("cuda") and usual_device() != "cuda":
        raise UsageError(f"`device`={place}: PyTorch finds no CUDA device; leave the option out to run on the CPU")
    wanted = {
        "compress": requested_compress(compress, recipe, _STOCK.compress),
        "recipe": recipe,
        "calibration": None if calibration is None else ModelCalibration.load(calibration),
    }
    text, *_ = evaluation_texts()
    options = ModelBench(
        model=model,
        context=context,
        batch=1,
        rounds=reps,
        tokens=decode_tokens,
        wanted=wanted,
        dtype=dtype or usual_dtype(place),
        device=place,
        seed=seed,
        text=text.content,
    )
    return measure_with_quality(options, text, scored, command, progress or SilentReporter())


def gguf_baseline(
    model: str,
    *,
    context: int = _GGUF.context,
    kv_types: tuple[str, ...] = tuple(_GGUF.kv_types.split(",")),
    reps: int = _GGUF.reps,
    decode_tokens: int = _GGUF.decode_tokens,
    scored: int = _GGUF.scored,
    threads: int | None = None,
    seed: int = _GGUF.seed,
    command: tuple[str, ...] = (),
    progress: Reporter | None = None,
) -> dict[str, Any]:
    """Measure llama.cpp's speed and prediction quality with each of its KV cache types.

    Parameters
    ----------
    model : a .gguf file, or OWNER/NAME:FILE.gguf on the hub.
    kv_types : the first is the reference for the others.
    reps, decode_tokens : samples per type, and decodes per sample.
    scored : number of predictions to compare with those of the first type; 0 skips them.
    threads : of the CPU; default: all.

    Raises
    ------
    UsageError : if a package is missing, an option is out of range, or llama.cpp cannot run the model.
    """
    from elastickv.model_benchmark.gguf import GgufBench, measure

    text, *_ = evaluation_texts()
    options = GgufBench(model, kv_types, context, reps, decode_tokens, scored, seed, text, threads)
    return measure(options, command, progress or SilentReporter())
