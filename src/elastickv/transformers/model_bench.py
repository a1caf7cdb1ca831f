"""A model's tokens per second with stock and elastic caches: one process, one model, taking turns."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from elastickv.bench.probes import ProcfsProbe, UnavailableError
from elastickv.errors import UsageError
from elastickv.recipe import DTYPES, FORMATS, AttentionShape
from elastickv.recipe.shape import MAX_CONTEXT
from elastickv.transformers.generating import (
    ELASTIC,
    STATIC,
    STOCK,
    Generation,
    Sampling,
    elastic,
    noise_floor,
    speedup,
    stock,
    stock_static,
    take_turns,
)
from elastickv.transformers.models import Loaded, load_model
from elastickv.transformers.needs import Needs, free_bytes
from elastickv.transformers.plan import UncalibratedWarning
from elastickv.transformers.running import WARM_UP_PROMPT, WARM_UP_TOKENS, described, surroundings
from elastickv.transformers.seam import release
from elastickv.transformers.shapes import built, shape_named
from elastickv.transformers.support import sizes_of, text_config

KIND = "elastickv-model-bench"
VERSION = 1
_FIRST_TOKENS = 2  # the prompt's, and a step that is not counted


class Progress(Protocol):
    """Is told what is going on."""

    def phase(self, name: str) -> None:
        """Begin a phase."""

    def progress(self, done: int, total: int) -> None:
        """Have done so much of it."""


@dataclass(frozen=True)
class ModelBench:
    """What to measure.

    Attributes
    ----------
    model : 'shape:8b' and its like, a folder, a .gguf file or a hub id.
    context : tokens of the prompt, a row.
    batch : rows.
    rounds : samples of each cache.
    tokens : steps of a sample.
    wanted : what `ElasticCache.for_model` takes: compress, recipe, calibration, capture.
    dtype, device : of the model.
    seed : of the order, the prompts and random weights.
    text : what prompts are cut from, where the model has a tokenizer.
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

    def __post_init__(self) -> None:
        # Two samples of each make an interval; a noise floor takes four.
        for name, value, least in (("--context", self.context, 2), ("--batch", self.batch, 1), ("--reps", self.rounds, 2)):
            if value < least:
                raise UsageError(f"{name}={value} is out of range: give a whole number from {least} up")
        if self.tokens < 1:
            raise UsageError(f"--decode-tokens={self.tokens} is out of range: give a whole number from 1 up")
        if self.dtype not in DTYPES:
            raise UsageError(f"--dtype={self.dtype} is unknown: choose {', '.join(DTYPES)}")
        if self.capacity > MAX_CONTEXT:
            raise UsageError(f"--context={self.context} and the decoded tokens exceed {MAX_CONTEXT}: give fewer")

    @property
    def capacity(self) -> int:
        """Tokens of a row at the end."""
        return self.context + _FIRST_TOKENS + self.rounds * (self.tokens + 1)


def measure(options: ModelBench, command: tuple[str, ...], progress: Progress) -> dict[str, Any]:
    """Return the result as JSON values.

    A sample is `tokens` steps of one `generate` that goes on with the text so far; its first step, which every cache takes
    uncompiled, is not counted. Samples are taken in randomised mirrored blocks.

    Raises
    ------
    UsageError : if the model cannot be served, or there is not the memory for it and an elastic cache.
    """
    progress.phase("loading")
    loaded = _loaded(options)
    ids = _prompts(loaded, options)
    mask, model, sampling = torch.ones_like(ids), loaded.model, Sampling(seed=options.seed, ends=False)
    not_run: dict[str, str] = {}
    made: list[Callable[[], Generation]] = [lambda: stock(model, ids, mask, sampling)]
    if model.device.type == "cuda":
        made.append(lambda: stock_static(model, ids, mask, sampling, options.capacity))
    else:
        not_run[STATIC] = "needs CUDA"
    # The elastic one sets the model's attention: it is checked first and begun last.
    wanted = dict(options.wanted) | ({"context": options.context} if options.wanted.get("compress") else {})
    with warnings.catch_warnings():
        if loaded.tokenizer is None:
            # Random weights have nothing to lose.
            warnings.simplefilter("ignore", UncalibratedWarning)
        ours = elastic(model, ids, mask, sampling, options.capacity, wanted)
    release(model)
    generations = []
    for make, name in zip(made, (STOCK, STATIC), strict=False):
        try:
            generations.append(_begun(make(), progress))
        except torch.OutOfMemoryError as error:
            not_run[name] = f"out of memory: {str(error).splitlines()[0]}"
            _free(model)
    try:
        generations.append(_begun(ours, progress))
    except torch.OutOfMemoryError:
        raise UsageError(
            f"{options.batch} x {options.context} tokens do not fit beside {len(generations)} stock caches: give a shorter "
            "--context, a smaller --batch or a larger --compress"
        ) from None
    progress.phase("measuring")
    probe = _host_probe()
    take_turns(generations, options.rounds, options.tokens + 1, options.seed, progress=progress.progress)
    return _result(options, command, loaded, generations, not_run) | {"host": None if probe is None else probe.read()}


def _host_probe() -> ProcfsProbe | None:
    """Return what tells, when it is read, how busy others kept the host in the meantime; None where nothing does."""
    try:
        return ProcfsProbe()
    except UnavailableError:
        return None


def _begun(generation: Generation, progress: Progress) -> Generation:
    progress.phase(f"{generation.name}: warming up")
    generation.rehearsal(WARM_UP_PROMPT).advance(WARM_UP_TOKENS)
    progress.phase(f"{generation.name}: prompt of {generation.prompt_tokens} tokens")
    generation.advance(_FIRST_TOKENS)
    return generation


def _free(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def _loaded(options: ModelBench) -> Loaded:
    shape = shape_named(options.model)
    device = options.device
    if shape is not None:
        attention = AttentionShape(options.batch, shape.query_heads, shape.kv_heads, shape.head_dim)
        weights, size = shape.weights_bytes(options.dtype), FORMATS[options.dtype].bits // 8
        needs = Needs(options.model, weights, shape.layers, attention, shape.hidden, shape.intermediate, options.dtype, size)
        if options.capacity > shape.positions:
            raise UsageError(f"{options.capacity} tokens are beyond the {shape.positions} positions of {options.model}")
        needs.check(options.capacity, options.wanted, free_bytes(device))
        return built(options.model, options.dtype, device, options.seed)
    loaded = load_model(options.model, options.dtype, device)
    sizes, text = sizes_of(loaded.model), text_config(loaded.model)
    attention = AttentionShape(options.batch, sizes.query_heads, sizes.kv_heads, sizes.stored_head_dim)
    intermediate = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    weights, size = sum(w.nbytes for w in loaded.model.parameters()), FORMATS[options.dtype].bits // 8
    needs = Needs(loaded.name, weights, len(sizes.elastic), attention, text.hidden_size, intermediate, options.dtype, size)
    needs.check(options.capacity, options.wanted, free_bytes(device), loaded=True)
    return loaded


def _prompts(loaded: Loaded, options: ModelBench) -> torch.Tensor:
    """Return (batch, context) ids: pieces of the text, or random numbers for a model without a tokenizer."""
    count = options.batch * options.context
    if loaded.tokenizer is None:
        vocabulary = text_config(loaded.model).vocab_size
        random = torch.Generator().manual_seed(options.seed)
        return torch.randint(1, vocabulary, (options.batch, options.context), generator=random)
    ids = torch.tensor(list(loaded.tokenizer(options.text, add_special_tokens=False, verbose=False).input_ids))
    return ids.repeat(-(-count // len(ids)))[:count].reshape(options.batch, options.context)


def _result(
    options: ModelBench, command: tuple[str, ...], loaded: Loaded, generations: list[Generation], not_run: dict[str, str]
) -> dict[str, Any]:
    ours = generations[-1]
    baselines = {generation.name: speedup(generation, ours, skipped=1) for generation in generations[:-1]}
    floor = noise_floor(generations[0], skipped=1)
    figures = {name: None if ratio is None else asdict(ratio) for name, ratio in baselines.items()}
    fastest = min(((figure["estimate"], name) for name, figure in figures.items() if figure), default=None)
    return {
        "kind": KIND,
        "version": VERSION,
        "environment": surroundings(),
        "command": list(command),
        "model": described(loaded) | {"random_weights": loaded.tokenizer is None},
        "compress": options.wanted.get("compress"),
        "recipe": options.wanted.get("recipe"),
        "calibrated": options.wanted.get("calibration") is not None,
        "context": options.context,
        "batch": options.batch,
        "rounds": options.rounds,
        "tokens": options.tokens,
        "seed": options.seed,
        "pairing": "abba",
        "caches": [_receipt(generation) for generation in generations],
        "speedups": figures,
        "baseline": None if fastest is None else fastest[1],
        "noise_floor_of": generations[0].name,
        "noise_floor": None if floor is None else asdict(floor),
        "faster": None if fastest is None or floor is None else _beyond_noise(figures[fastest[1]], asdict(floor)),
        "not_run": not_run,
    }


def _beyond_noise(ratio: Mapping[str, float] | None, floor: Mapping[str, float]) -> bool:
    return ratio is not None and ratio["low"] > max(1.0, floor["high"])


def _receipt(generation: Generation) -> dict[str, Any]:
    """Return a generation's receipt with the speed of the counted samples, and the samples."""
    counted = generation.pieces[1:]
    steps = [step for piece in counted for step in piece.step_s]
    rows = generation.ids.shape[0]
    return generation.receipt() | {
        "tokens_per_s": rows * len(steps) / sum(steps),
        "step_s": [list(piece.step_s) for piece in counted],
    }


__all__ = ["ELASTIC", "STATIC", "STOCK", "ModelBench", "measure"]
