"""Tokens per second of one model with stock and elastic caches, in turns in one process."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from traceback import clear_frames
from typing import Any

import torch

from elastickv.benchmark.reporter import Reporter, SilentReporter
from elastickv.benchmark.stats.intervals import beyond_noise
from elastickv.benchmark.telemetry_probes import ProcfsProbe, UnavailableError
from elastickv.errors import UsageError
from elastickv.evaluation import sessions
from elastickv.evaluation.layer_progress import layer_progress
from elastickv.evaluation.loading_progress import loading_progress
from elastickv.evaluation.prefill import prefill
from elastickv.evaluation.scoring import score
from elastickv.evaluation.texts import Text, windows
from elastickv.model_benchmark.generation import (
    ELASTIC,
    STATIC,
    STOCK,
    Generation,
    Sampling,
    elastic,
    stock,
    stock_static,
    take_turns,
)
from elastickv.model_benchmark.memory_estimate import MemoryEstimate, free_bytes
from elastickv.model_benchmark.quality_delta import quality_delta
from elastickv.model_benchmark.records import SKIPPED, cache_record, device_record, environment_record, model_record
from elastickv.model_benchmark.shapes import built, shape_named
from elastickv.model_benchmark.speedups import noise_floor, speedup, step_means
from elastickv.recipe import DTYPES, Recipe
from elastickv.recipe.shape import MAX_CONTEXT
from elastickv.results.kinds.model_result import QualityDelta
from elastickv.transformers.config import UncalibratedWarning
from elastickv.transformers.cuda_graph.model_patch import release
from elastickv.transformers.model_loading import Loaded, load_model
from elastickv.transformers.model_support import text_config
from elastickv.transformers.tokenization import filled_prompts, text_prefix, text_tokens, tokens_hash

KIND = "elastickv-model-bench"
VERSION = 1
_FIRST_TOKENS = 6  # the prompt's, and steps that are not timed: some of them capture graphs


@dataclass(frozen=True)
class ModelBench:
    """What `measure` measures.

    Attributes
    ----------
    model : 'shape:8b' and its like, a folder, a .gguf file or a hub id.
    context : tokens of the prompt per row.
    batch : rows.
    rounds : samples of each cache.
    tokens : steps of a sample.
    wanted : keyword arguments of `ElasticCache.for_model`: compress, recipe, calibration, capture.
    dtype, device : of the model.
    seed : of the order, the prompts and random weights.
    text : source of the prompts if the model has a tokenizer.
    temperature : 0 takes the likeliest token.
    """

    model: str
    context: int
    batch: int
    rounds: int
    tokens: int
    wanted: Mapping[str, Any]
    dtype: str
    device: str
    seed: int
    text: str
    temperature: float = 0.0

    def __post_init__(self) -> None:
        # Two samples of each make an interval; a noise floor takes four.
        for name, value, least in (("context", self.context, 2), ("batch", self.batch, 1), ("reps", self.rounds, 2)):
            if value < least:
                raise UsageError(f"`{name}`={value} is out of range: give a whole number from {least} up")
        if self.tokens < 1:
            raise UsageError(f"`decode_tokens`={self.tokens} is out of range: give a whole number from 1 up")
        if self.dtype not in DTYPES:
            raise UsageError(f"`dtype`={self.dtype} is unknown: choose {', '.join(DTYPES)}")
        if self.capacity > MAX_CONTEXT:
            raise UsageError(f"`context`={self.context} and the decoded tokens exceed {MAX_CONTEXT}: give fewer")

    @property
    def capacity(self) -> int:
        """Tokens per row at the end."""
        return self.context + _FIRST_TOKENS + self.rounds * (self.tokens + 1)


def measure(options: ModelBench, command: tuple[str, ...], progress: Reporter, loaded: Loaded | None = None) -> dict[str, Any]:
    """Return the result as JSON values.

    A sample is `tokens` steps of one `generate` that continues the text so far; its first step, which every cache runs
    uncompiled, is not timed. Samples are taken in randomized mirrored blocks. A stock cache that fails, or that leaves no
    memory for the elastic cache, is not run, and the result says why.

    Parameters
    ----------
    loaded : the model, if `load` has been called with the same options.

    Raises
    ------
    UsageError : if the model is not supported, or it does not fit the memory with an elastic cache.
    """
    if loaded is None:
        loaded = _loaded(options, progress)
    ids = _prompts(loaded, options)
    mask, model, sampling = torch.ones_like(ids), loaded.model, Sampling(options.temperature, options.seed, ends=False)
    made: list[Callable[[], Generation]] = [
        lambda: stock(model, ids, mask, sampling),
        lambda: stock_static(model, ids, mask, sampling, options.capacity),
    ]
    # The elastic cache sets the model's attention: it is created first, so that errors come early, and started last.
    wanted = dict(options.wanted) | ({"context": options.context} if options.wanted.get("compress") else {})
    with warnings.catch_warnings():
        if loaded.tokenizer is None:
            # Random weights have nothing to lose.
            warnings.simplefilter("ignore", UncalibratedWarning)
        ours = elastic(model, ids, mask, sampling, options.capacity, wanted)
    release(model)
    progress.phase("measuring the device")
    device = device_record(model.device)
    not_run: dict[str, str] = {}
    generations: list[Generation] = []
    for make, name in zip(made, (STOCK, STATIC), strict=True):
        if name == STATIC and model.device.type != "cuda":
            not_run[name] = "needs CUDA"
        elif name == STATIC and STOCK in not_run:
            not_run[name] = f"holds at least as much as {STOCK}, which did not run"
        else:
            not_run |= _tried(make, name, generations, progress)
    _begin_beside(ours, generations, not_run, progress)
    generations.append(ours)
    progress.phase("measuring")
    probe = _host_probe()
    take_turns(generations, options.rounds, options.tokens + 1, options.seed, progress=progress.progress)
    host = None if probe is None else probe.read()
    prefix = [] if loaded.tokenizer is None else list(text_prefix(loaded.tokenizer))
    prompt = {"prefix": prefix, "hash": tokens_hash(ids.tolist())}
    return _result(options, command, loaded, generations, device) | {"not_run": not_run, "host": host, "prompt": prompt}


def measure_with_quality(
    options: ModelBench, text: Text, scored: int, command: tuple[str, ...], progress: Reporter
) -> dict[str, Any]:
    """Return the result of `measure` with `fidelity`: what the timed recipes do to the model's predictions of a text.

    Parameters
    ----------
    scored : number of predictions to compare with those of full attention; 0 skips them.

    Raises
    ------
    UsageError : as `measure` does.
    """
    if scored < 0:
        raise UsageError(f"`scored`={scored} is out of range: give a whole number from 0 up")
    loaded = _loaded(options, progress)
    result = measure(options, command, progress, loaded)
    delta, reason = _quality(loaded, options, result["caches"][-1], text, scored, progress)
    return result | {"fidelity": None if delta is None else asdict(delta), "fidelity_not_measured": reason}


def _quality(
    loaded: Loaded, options: ModelBench, cache: Mapping[str, Any], text: Text, scored: int, progress: Reporter
) -> tuple[QualityDelta | None, str | None]:
    """Return the quality of a timed elastic cache's recipes at the timed context, or why it is not measured."""
    assert cache["cache"] == ELASTIC
    if not scored:
        return None, "not asked for: --scored 0"
    if loaded.tokenizer is None:
        return None, "random weights have nothing to lose"
    recipes = [Recipe.parse(recipe) for recipe in cache["recipes"].values()]
    try:
        rows = windows([text], loaded.tokenizer, options.context + scored + 1, 1)
    except UsageError as error:
        return None, str(error)
    release(loaded.model)
    progress.phase("predictions")
    start = prefill(loaded.model, [rows[0].ids[:-1]], options.context, scored, progress.progress)
    decoding = partial(sessions.elastic, loaded.model, recipes, calibration=options.wanted.get("calibration"))
    scores = score(rows, start, decoding, progress.progress)
    return quality_delta(STOCK, text.name, options.context, scores), None


def _tried(make: Callable[[], Generation], name: str, begun: list[Generation], progress: Reporter) -> dict[str, str]:
    """Start a generation with a stock cache and add it to `begun`; if it fails, free its memory and return the reason."""
    try:
        begun.append(_begun(make(), progress))
    except RuntimeError as error:
        # Out of memory (also as an error of the driver or the compiler), or no working compiler.
        reason = _reason(error)
        clear_frames(error.__traceback__)
    else:
        return {}
    _forget_compiled()
    return {name: reason}


def _begin_beside(ours: Generation, begun: list[Generation], not_run: dict[str, str], progress: Reporter) -> None:
    """Start the elastic generation. If memory runs out, drop stock ones from `begun`, the last one first.

    Raises
    ------
    UsageError : if it does not fit alone.
    """
    while True:
        try:
            _begun(ours, progress)
            return
        except (RuntimeError, UsageError) as error:
            if not begun:
                if isinstance(error, torch.OutOfMemoryError):
                    raise UsageError(
                        f"{_reason(error)}: give a shorter `context`, a smaller `batch` or a larger `compress`"
                    ) from None
                raise
            not_run[begun.pop().name] = f"left no memory for the elastic cache: {_reason(error)}"
            clear_frames(error.__traceback__)
        ours.restart()
        _forget_compiled()


def _reason(error: Exception) -> str:
    """Return an error's first sentence."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"out of memory: {text}" if isinstance(error, torch.OutOfMemoryError) else text


def _forget_compiled() -> None:
    """Free the compiled steps of a static cache that no longer exists."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _host_probe() -> ProcfsProbe | None:
    """Return a probe of the host's other load from now until it is read; None if the system has none."""
    try:
        return ProcfsProbe()
    except UnavailableError:
        return None


def _begun(generation: Generation, progress: Reporter) -> Generation:
    progress.phase(f"{generation.name}: warming up")
    generation.rehearse()
    progress.phase(f"{generation.name}: prompt of {generation.prompt_tokens} tokens")
    with layer_progress(generation.model, progress.progress):
        generation.advance(_FIRST_TOKENS)
    return generation


def _loaded(options: ModelBench, progress: Reporter) -> Loaded:
    progress.phase("loading")
    # Where nobody looks, such as in a notebook, the loaders' bars stay switched off.
    with nullcontext() if isinstance(progress, SilentReporter) else loading_progress(progress.progress):
        return load(options)


def load(options: ModelBench) -> Loaded:
    """Load the model, and check that it fits the memory with its caches.

    Raises
    ------
    UsageError : if it cannot be loaded, or does not fit.
    """
    shape = shape_named(options.model)
    if shape is None:
        loaded = load_model(options.model, options.dtype, options.device)
        estimate = MemoryEstimate.of_model(loaded, options.dtype, options.batch)
        estimate.check(options.capacity, options.wanted, free_bytes(options.device), loaded=True)
        return loaded
    if options.capacity > shape.positions:
        raise UsageError(f"{options.capacity} tokens are beyond the {shape.positions} positions of {options.model}")
    estimate = MemoryEstimate.of_shape(options.model, shape, options.dtype, options.batch)
    estimate.check(options.capacity, options.wanted, free_bytes(options.device))
    return built(options.model, options.dtype, options.device, options.seed)


def _prompts(loaded: Loaded, options: ModelBench) -> torch.Tensor:
    """Return (batch, context) ids: pieces of the text, each begun as a text, or random ids for a model without a tokenizer."""
    if loaded.tokenizer is None:
        vocabulary = text_config(loaded.model).vocab_size
        random = torch.Generator().manual_seed(options.seed)
        return torch.randint(1, vocabulary, (options.batch, options.context), generator=random)
    prefix, ids = text_prefix(loaded.tokenizer), text_tokens(loaded.tokenizer, options.text)
    return torch.tensor(filled_prompts(prefix, ids, options.context, options.batch))


def _result(
    options: ModelBench, command: tuple[str, ...], loaded: Loaded, generations: list[Generation], device: dict[str, Any]
) -> dict[str, Any]:
    ours, model = generations[-1], model_record(loaded)
    caches = [cache_record(g, model["read_weights_bytes"], device["read_ceiling_gbs"]) for g in generations]
    baselines = {generation.name: speedup(generation, ours, SKIPPED) for generation in generations[:-1]}
    floor = noise_floor(step_means(generations[0])[SKIPPED:])
    ratios = {name: ratio for name, ratio in baselines.items() if ratio is not None}
    times = {name: ratio.estimate for name, ratio in ratios.items()}
    # Too few samples make no interval, but they have a mean.
    times = times or {cache["cache"]: 1 / cache["tokens_per_s"] for cache in caches[:-1]}
    fastest = min(times, key=lambda name: times[name], default=None)
    return {
        "kind": KIND,
        "version": VERSION,
        "environment": environment_record(),
        "machine": device,
        "command": list(command),
        "model": model | {"random_weights": loaded.tokenizer is None},
        "compress": options.wanted.get("compress"),
        "recipe": options.wanted.get("recipe"),
        "calibrated": options.wanted.get("calibration") is not None,
        "context": options.context,
        "batch": options.batch,
        "rounds": options.rounds,
        "tokens": options.tokens,
        "seed": options.seed,
        "temperature": options.temperature,
        "pairing": "abba",
        "caches": caches,
        "speedups": {name: None if ratio is None else asdict(ratio) for name, ratio in baselines.items()},
        "baseline": fastest,
        "noise_floor_of": generations[0].name,
        "noise_floor": None if floor is None else asdict(floor),
        "faster": None if fastest is None or floor is None else fastest in ratios and beyond_noise(ratios[fastest], floor),
    }


__all__ = ["ELASTIC", "STATIC", "STOCK", "ModelBench", "load", "measure"]
