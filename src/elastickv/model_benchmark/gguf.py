"""llama.cpp's KV cache types on one model: speed, predictions, and bytes compared with our formats."""

import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np

from elastickv.backends import load
from elastickv.benchmark import Reporter
from elastickv.benchmark.environment import environment
from elastickv.benchmark.sampler import schedule
from elastickv.errors import DoesNotFit, UsageError
from elastickv.evaluation.metrics import Scores, token_figures
from elastickv.evaluation.texts import Text
from elastickv.model_benchmark.gguf_file import KV_TYPES, GgufModel, read_gguf
from elastickv.model_benchmark.llama_cpp import Llama, device, engine, require_bindings
from elastickv.model_benchmark.quality_delta import quality_delta
from elastickv.model_benchmark.speedups import interval_or_none, mean_interval, noise_floor
from elastickv.recipe import AttentionShape, Recipe, dense_bytes, read_ratio, stored_bytes
from elastickv.results.kinds.gguf_result import GGUF_KIND, GGUF_VERSION, GgufBaseline, GgufShape, KvCache, OurFormat
from elastickv.results.kinds.model_result import PromptTokens, QualityDelta
from elastickv.transformers.tokenization import filled_prompts, tokens_hash

DEFAULT_KV_TYPES = ("f16", "q8_0", "q4_0")
FORMATS = ("int8", "fp8", "int4")
# Between these lengths every added token is cold, and both are whole numbers of pages.
_COLD_FROM, _COLD_TOKENS = 4096, 1024
_GIB = 1 << 30


@dataclass(frozen=True)
class GgufBench:
    """What `measure` measures.

    Attributes
    ----------
    model : path of a .gguf file, or OWNER/NAME:FILE.gguf.
    kv_types : the first is the reference for the others.
    context : tokens of the prompt.
    rounds : samples of each type.
    tokens : decodes of a sample.
    scored : number of predictions of the text to compare with those of the first type; 0 skips them.
    seed : of the order.
    text : the prompt is its beginning.
    threads : of the CPU; None for as many as the process may use.
    """

    model: str
    kv_types: tuple[str, ...]
    context: int
    rounds: int
    tokens: int
    scored: int
    seed: int
    text: Text
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("context", self.context, 2),
            ("reps", self.rounds, 2),
            ("decode_tokens", self.tokens, 1),
            ("scored", self.scored, 0),
            ("threads", self.used_threads, 1),
        ):
            if value < least:
                raise UsageError(f"`{name}`={value} is out of range: give a whole number from {least} up")
        unknown = [kv_type for kv_type in self.kv_types if kv_type not in KV_TYPES]
        if unknown or not self.kv_types:
            names = ",".join(unknown) or "(nothing)"
            raise UsageError(f"`kv_types`={names} is unknown to llama.cpp: choose from {', '.join(KV_TYPES)}")
        if len(set(self.kv_types)) < len(self.kv_types):
            raise UsageError(f"`kv_types`={','.join(self.kv_types)} names a type twice: give each once")

    @property
    def used_threads(self) -> int:
        """Threads of the CPU."""
        if self.threads is not None:
            return self.threads
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    @property
    def capacity(self) -> int:
        """Capacity of a cache, tokens."""
        return self.context + max(self.tokens, self.scored) + 1


def measure(options: GgufBench, command: tuple[str, ...], progress: Reporter) -> dict[str, Any]:
    """Return the result as JSON values.

    A sample reads the prompt into an empty cache and decodes `tokens` tokens after it. Types take turns in randomized mirrored
    blocks, after one warm-up sample of each.

    Raises
    ------
    UsageError : if the bindings or the model are missing, or llama.cpp cannot run the model.
    DoesNotFit : if weights and caches are larger than the memory.
    """
    require_bindings()
    model = read_gguf(options.model)
    _check(options, model)
    started = time.monotonic()
    progress.phase("opening the model")
    opened = {kv_type: Llama(model, kv_type, options.capacity, options.used_threads) for kv_type in options.kv_types}
    llama = next(iter(opened.values()))
    own = llama.encoded(options.text.content)
    (prompt,) = filled_prompts(llama.prefix, own, options.context)
    text = [*llama.prefix, *own]
    progress.phase("warming up")
    for done, each in enumerate(opened.values(), 1):
        each.timed(prompt, options.tokens)
        progress.progress(done, len(opened))
    progress.phase("measuring")
    samples: dict[str, list[tuple[float, float]]] = {kv_type: [] for kv_type in opened}
    for done, kv_type in enumerate(schedule(list(opened), options.rounds, True, options.seed), 1):
        samples[kv_type].append(opened[kv_type].timed(prompt, options.tokens))
        progress.progress(done, options.rounds * len(opened))
    reason = _unscored(options, text)
    deltas = {} if reason else _quality_deltas(options, opened, text, progress)
    decodes = {kv_type: [decode for _, decode in taken] for kv_type, taken in samples.items()}
    first, *others = options.kv_types
    formats, unformed = _our_formats(model, options.context)
    result = GgufBaseline(
        kind=GGUF_KIND,
        version=GGUF_VERSION,
        environment=environment(),
        command=list(command),
        engine=engine(),
        threads=options.used_threads,
        model=_described(model),
        context=options.context,
        tokens=options.tokens,
        rounds=options.rounds,
        seed=options.seed,
        pairing="abba",
        caches=[_cache(model, options, kv_type, samples[kv_type], deltas.get(kv_type)) for kv_type in opened],
        speedups={kv_type: interval_or_none(decodes[first], decodes[kv_type]) for kv_type in others},
        baseline=first,
        noise_floor=noise_floor(decodes[first]),
        formats=formats,
        formats_not_counted=unformed,
        bytes_not_counted=model.uncounted,
        fidelity_not_measured=reason,
        seconds=time.monotonic() - started,
        prompt=PromptTokens(list(llama.prefix), tokens_hash([prompt])),
    )
    return asdict(result)


def _check(options: GgufBench, model: GgufModel) -> None:
    if options.capacity > model.positions:
        raise UsageError(
            f"{options.capacity} tokens (`context` {options.context} and those after it) are beyond the {model.positions} "
            f"positions of {model.path.name}: give a shorter `context`"
        )
    for kv_type in options.kv_types:
        model.check_type(kv_type)
    caches = sum(model.kv_bytes_per_token(kv_type) for kv_type in options.kv_types) * options.capacity
    used = device()
    free = used["memory_free"] if used["name"] != "CPU" else load("cpu")[0].device.free_bytes
    if model.file_bytes + caches > free:
        raise DoesNotFit(
            f"{model.path.name} ({model.file_bytes / _GIB:.1f} GiB) and {len(options.kv_types)} KV caches of "
            f"{options.capacity} tokens ({caches / _GIB:.1f} GiB) do not fit the {free / _GIB:.1f} GiB that are free: give a "
            "shorter `context`, fewer `kv_types` or a smaller model"
        )


def _unscored(options: GgufBench, text: list[int]) -> str | None:
    """Return why predictions are not measured; None if they are."""
    if not options.scored:
        return "not asked for: --scored 0"
    if len(text) < options.context + options.scored:
        return f"{options.text.name} has {len(text)} tokens, and {options.context} + {options.scored} are needed"
    return None


def _quality_deltas(
    options: GgufBench, opened: dict[str, Llama], text: list[int], progress: Reporter
) -> dict[str, QualityDelta]:
    """Return the quality of each type: the text's tokens are decoded one by one through that type's cache."""
    progress.phase("predictions")
    figures: dict[str, list[Iterable[float]]] = {kv_type: [] for kv_type in opened}
    for step in range(options.scored):
        end = options.context + step
        predictions = {kv_type: llama.log_probabilities(text[:end]) for kv_type, llama in opened.items()}
        reference = predictions[options.kv_types[0]]
        for kv_type, prediction in predictions.items():
            figures[kv_type].append(np.concatenate(token_figures([reference], [prediction], [text[end]])))
        progress.progress(step + 1, options.scored)
    first, name, context = options.kv_types[0], options.text.name, options.context
    return {
        kv_type: quality_delta(first, name, context, Scores(*np.array(rows).T[:, None])) for kv_type, rows in figures.items()
    }


def _cache(
    model: GgufModel, options: GgufBench, kv_type: str, samples: list[tuple[float, float]], delta: QualityDelta | None
) -> KvCache:
    prompts, decodes = ([sample[i] for sample in samples] for i in range(2))
    prompt_ms, step_ms = [1e3 * s / options.context for s in prompts], [1e3 * s / options.tokens for s in decodes]
    counted = model.uncounted is None
    return KvCache(
        cache=kv_type,
        prompt_tokens_per_s=1e3 / fmean(prompt_ms),
        prompt_ms=mean_interval(prompt_ms),
        tokens_per_s=1e3 / fmean(step_ms),
        step_ms=mean_interval(step_ms),
        kv_bytes_per_token=model.kv_bytes_per_token(kv_type) if counted else None,
        stored_ratio=model.kv_bytes_per_token("f16") / model.kv_bytes_per_token(kv_type) if counted else None,
        fidelity=delta,
        prompt_s=prompts,
        decode_s=decodes,
    )


def _our_formats(model: GgufModel, context: int) -> tuple[list[OurFormat], str | None]:
    """Return the bytes of our formats per token in all layers, or why they cannot be computed."""
    if model.uncounted is not None:
        return [], model.uncounted
    if model.key_dim != model.value_dim:
        return [], f"keys of {model.key_dim} and values of {model.value_dim} elements"
    formats = []
    try:
        shapes = [AttentionShape(1, model.query_heads, heads, model.key_dim) for heads in model.kv_heads if heads]
        for name in FORMATS:
            recipe = Recipe.parse(name)
            stored, few, more = (
                sum(stored_bytes(recipe, [tokens], shape) for shape in shapes)
                for tokens in (context, _COLD_FROM, _COLD_FROM + _COLD_TOKENS)
            )
            dense = sum(dense_bytes([context], shape) for shape in shapes)
            read = sum(dense_bytes([context], shape) / read_ratio(recipe, [context], shape) for shape in shapes)
            formats.append(
                OurFormat(name, recipe.hash, stored / context, (more - few) / _COLD_TOKENS, dense / stored, dense / read)
            )
    except UsageError as error:
        return [], str(error)
    return formats, None


def _described(model: GgufModel) -> GgufShape:
    known = {name: getattr(model, name) for name in GgufShape.__dataclass_fields__ if name not in ("name", "kv_heads")}
    return GgufShape(name=model.path.name, kv_heads=list(model.kv_heads), **known)
