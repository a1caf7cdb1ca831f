"""Timed text generation piece by piece; stock and elastic caches take turns."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.generation.streamers import BaseStreamer

from elastickv.benchmark.sampler import schedule
from elastickv.errors import UsageError
from elastickv.model_benchmark.memory_estimate import Footprint
from elastickv.recipe import Recipe
from elastickv.transformers.cache import ElasticCache
from elastickv.transformers.cache_argument import CACHE_ARGUMENT
from elastickv.transformers.cuda_graph.model_patch import patch_of, restore
from elastickv.transformers.generation_settings import plain_decoding
from elastickv.transformers.model_support import sizes_of, text_config

STOCK, STATIC, ELASTIC = "stock", "stock static+compile", "elastic"
_STATIC_ROUNDING = 64
# More than sinks and window, so that pages are stored and read. On CUDA the steps cover those that compile kernels and capture
# graphs; on a CPU one that computes an anchor and one that does not.
_WARM_UP_PROMPT = 192
WARM_UP_TOKENS = defaultdict(lambda: 6, cpu=3)
OnToken = Callable[[torch.Tensor], None]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes
    ----------
    temperature : 0 takes the likeliest token.
    seed : of the random numbers if the temperature is above 0.
    ends : whether generation stops at an end-of-text token.
    """

    temperature: float = 0.0
    seed: int = 0
    ends: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UsageError(f"temperature {self.temperature} is out of range: give 0 (the likeliest token) up to 100")

    def config(self, model: Any, tokens: int) -> GenerationConfig:
        """Return the configuration for `generate`."""
        own = model.generation_config
        choice = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        padding = own.pad_token_id if own.pad_token_id is not None else 0
        config = GenerationConfig(max_new_tokens=tokens, pad_token_id=padding, **choice)
        config.eos_token_id = own.eos_token_id
        if not self.ends:
            config.min_new_tokens = tokens
        return config


@dataclass(frozen=True)
class Piece:
    """A run of consecutive tokens.

    Attributes
    ----------
    tokens : generated per row.
    first_s : seconds until the first token; includes the prompt if the piece begins with it.
    step_s : seconds of each step after the first.
    """

    tokens: int
    first_s: float
    step_s: tuple[float, ...]


class _TokenClock(BaseStreamer):  # type: ignore[misc]
    """Records when tokens reach the host, and passes them on."""

    def __init__(self, on_token: OnToken | None) -> None:
        self._on_token, self._prompt_seen = on_token, False
        self.started = time.perf_counter()
        self.token_times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Receive the prompt in the first call, then one token per row, (rows,)."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.token_times.append(time.perf_counter())
        if self._on_token is not None:
            self._on_token(value)

    def end(self) -> None:
        """Do nothing: the token times are complete."""

    def piece(self) -> Piece:
        """Return the recorded times."""
        times = self.token_times
        steps = tuple(after - before for before, after in zip(times, times[1:], strict=False))
        return Piece(len(times), times[0] - self.started, steps)


class Generation:
    """A text that is generated in pieces with one cache.

    Parameters
    ----------
    name : of the contender.
    model : its current attention implementation is the one that the cache works with.
    ids, mask : (rows, tokens) of the prompt.
    """

    def __init__(self, name: str, model: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor, sampling: Sampling) -> None:
        self.name, self.model, self.cache, self.sampling = name, model, cache, sampling
        self.ids, self._mask, self.prompt_tokens = ids.to(model.device), mask.to(model.device), int(ids.shape[1])
        self.pieces: list[Piece] = []
        self.footprint = Footprint(self.ids.device)
        self._patch = patch_of(model)
        self._random: dict[str, torch.Tensor] | None = None
        self._stock_read_bytes = 0.0

    @property
    def new_tokens(self) -> int:
        """Tokens generated so far per row."""
        length: int = self.ids.shape[1]
        return length - self.prompt_tokens

    @property
    def ended(self) -> bool:
        """Whether every row's text has ended."""
        ends = self.model.generation_config.eos_token_id
        if not self.sampling.ends or ends is None:
            return False
        end_ids = torch.as_tensor(ends, device=self.ids.device).reshape(-1)
        return bool(torch.isin(self.ids[:, self.prompt_tokens :], end_ids).any(dim=1).all())

    def advance(self, tokens: int, on_token: OnToken | None = None) -> Piece:
        """Generate up to `tokens` tokens per row, and call `on_token` with each, (rows,).

        Sets the model's attention to the one that this cache was made for, and continues this text's own random numbers.
        """
        restore(self.model, self._patch)
        before = self._stock_bytes()
        with self._own_random(), self.footprint.watched(), plain_decoding(self.model):
            clock = _TokenClock(on_token)
            ids = self.model.generate(
                input_ids=self.ids,
                attention_mask=self._mask,
                generation_config=self.sampling.config(self.model, tokens),
                streamer=clock,
                **{CACHE_ARGUMENT: self.cache},
            )
        self._mask = torch.nn.functional.pad(self._mask, (0, ids.shape[1] - self.ids.shape[1]), value=1)
        self.ids = ids
        piece = clock.piece()
        # The prompt's pass is not a decode. A step reads the whole stock cache, which grows evenly.
        after = self._stock_bytes()
        self._stock_read_bytes += (piece.tokens if self.pieces else piece.tokens - 1) * ((before or after) + after) / 2
        self.pieces.append(piece)
        return piece

    def rehearse(self, prompt_tokens: int = _WARM_UP_PROMPT, tokens: int | None = None) -> None:
        """Generate after the prompt's first `prompt_tokens` tokens with an empty cache of the same kind, and discard it.

        An elastic cache has the same capacity: `tokens` must not exceed those that will be generated. This compiles and loads
        the kernels. A static cache is used itself and then reset, because its steps are compiled for its own buffers; their
        memory counts as the generation's.
        """
        static = isinstance(self.cache, StaticCache)
        if isinstance(self.cache, ElasticCache):
            cache: Any = self.cache.another()
        else:
            cache = self.cache if static else DynamicCache(config=text_config(self.model))
        restore(self.model, self._patch)
        prompt = slice(0, prompt_tokens)
        other = Generation(self.name, self.model, cache, self.ids[:, prompt], self._mask[:, prompt], self.sampling)
        if static:
            other.footprint = self.footprint
        other.advance(WARM_UP_TOKENS[self.ids.device.type] if tokens is None else tokens)
        if static:
            self.cache.reset()

    def restart(self) -> None:
        """Discard everything generated with an elastic cache, including a piece that ran out of memory."""
        self.cache.reset()
        self.ids, self._mask = self.ids[:, : self.prompt_tokens], self._mask[:, : self.prompt_tokens]
        self.pieces.clear()
        self.footprint, self._random, self._stock_read_bytes = Footprint(self.ids.device), None, 0.0

    def text_ids(self) -> list[list[int]]:
        """Return the ids of each row's text without the prompt."""
        rows: list[list[int]] = self.ids[:, self.prompt_tokens :].tolist()
        return rows

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        device = self.ids.device
        cuda = device.type == "cuda"
        with torch.random.fork_rng(devices=[device] if cuda else []):
            if self._random is None:
                torch.manual_seed(self.sampling.seed)
            else:
                torch.set_rng_state(self._random["cpu"])
                if cuda:
                    torch.cuda.set_rng_state(self._random["cuda"], device)
            try:
                yield
            finally:
                self._random = {"cpu": torch.get_rng_state()}
                if cuda:
                    self._random["cuda"] = torch.cuda.get_rng_state(device)

    def _stock_bytes(self) -> int:
        """Return the bytes of the layers that Transformers stores."""
        tensors = [getattr(layer, name, None) for layer in self.cache.layers for name in ("keys", "values")]
        return sum(int(tensor.nbytes) for tensor in tensors if isinstance(tensor, torch.Tensor))

    def _other_bytes(self) -> int:
        """Return the bytes of the stored layers without full attention: windows, which an elastic cache does not compress."""
        elastic = sizes_of(self.model).elastic
        layers = [layer for number, layer in enumerate(self.cache.layers) if number not in elastic]
        tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
        return sum(int(tensor.nbytes) for tensor in tensors if isinstance(tensor, torch.Tensor))

    def _dense_bytes(self) -> int:
        """Return the bytes of all tokens in a dense 16-bit cache of the layers with full attention."""
        tokens: int = self.ids.shape[0] * int(self.cache.get_seq_length())
        sizes = sizes_of(self.model)
        return tokens * len(sizes.elastic) * 2 * sizes.kv_heads * sizes.head_dim * 2

    def metrics(self) -> dict[str, Any]:
        """Return time, bytes and memory of this text, as JSON values.

        Stock layers count the bytes that they hold, read whole once a step; elastic layers count by recipe. The ratios compare
        the elastic layers alone with a dense 16-bit cache.
        """
        steps = [step for piece in self.pieces for step in piece.step_s]
        rows, stock = self.ids.shape[0], self._stock_bytes()
        record: dict[str, Any] = {
            "cache": self.name,
            "rows": rows,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "first_token_s": self.pieces[0].first_s,
            "tokens_per_s": rows * len(steps) / sum(steps) if steps else None,
            "kv_read_bytes": self._stock_read_bytes,
            "kv_stored_bytes": stock,
            "kv_dense_bytes": self._dense_bytes(),
            "kv_allocated_bytes": stock,
            "kv_other_bytes": self._other_bytes(),
            "kv_other_dense_bytes": self._other_bytes() * 2 // self.model.dtype.itemsize,
            "held_bytes": self.footprint.held_bytes,
            "peak_bytes": self.footprint.peak_bytes,
            "peak_source": self.footprint.source,
        }
        if not isinstance(self.cache, ElasticCache):
            return record
        report = self.cache.report()
        return record | {
            "kv_read_bytes": report.read_bytes + self._stock_read_bytes,
            "kv_stored_bytes": report.stored_bytes + stock,
            "kv_allocated_bytes": report.allocated_bytes + stock,
            "read_ratio": report.read_ratio,
            "stored_ratio": report.stored_ratio,
            "model_stored_ratio": report.model_stored_ratio if report.stock_bytes else None,
            "storing_s": report.quantize_seconds,
            "storing_share_of_first_token": report.quantize_seconds / self.pieces[0].first_s,
            "holds_from": report.holds_from,
            "captured_share": report.captured / report.decodes if report.decodes else None,
            "not_captured": report.not_captured,
            "ahead_share": report.ahead / report.decodes if report.decodes else None,
            "calibrated": report.calibrated,
            "recipe_hash": _hash(report.recipes.values()),
            "recipes": {str(layer): str(recipe) for layer, recipe in report.recipes.items()},
        }


def _hash(recipes: Iterable[Recipe]) -> str | None:
    """Return the recipe's hash; where layers differ, 12 hex digits of the SHA-256 of all of theirs in order."""
    hashes = [recipe.hash for recipe in recipes]
    if len(set(hashes)) <= 1:
        return hashes[0] if hashes else None
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:12]


def stock(model: Any, ids: torch.Tensor, mask: torch.Tensor, sampling: Sampling) -> Generation:
    """Return a generation with Transformers' default cache."""
    return Generation(STOCK, model, DynamicCache(config=text_config(model)), ids, mask, sampling)


def stock_static(model: Any, ids: torch.Tensor, mask: torch.Tensor, sampling: Sampling, capacity: int) -> Generation:
    """Return a generation with Transformers' static cache of `capacity` tokens, whose steps `generate` compiles on CUDA."""
    # PyTorch copies a mask of unaligned length at every step.
    rounded = -(-capacity // _STATIC_ROUNDING) * _STATIC_ROUNDING
    return Generation(STATIC, model, StaticCache(text_config(model), max_cache_len=rounded), ids, mask, sampling)


def elastic(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, sampling: Sampling, capacity: int, wanted: Mapping[str, Any]
) -> Generation:
    """Return a generation with an elastic cache.

    Create those with stock caches first: this one sets the model's attention.

    Parameters
    ----------
    capacity : tokens of prompt and text.
    wanted : keyword arguments of `ElasticCache.for_model`: compress, recipe, calibration.

    Raises
    ------
    UsageError : if the model is not supported, or prompt and text exceed its positions.
    """
    check_positions(model, int(ids.shape[1]), capacity - int(ids.shape[1]))
    return Generation(ELASTIC, model, ElasticCache.for_model(model, capacity=capacity, **wanted), ids, mask, sampling)


def check_positions(model: Any, prompt_tokens: int, new_tokens: int) -> None:
    """Check that prompt and text fit the positions of a model, which needs no weights.

    Raises
    ------
    UsageError : if they do not, or the model is not supported.
    """
    most = sizes_of(model).max_positions
    if most is not None and prompt_tokens + new_tokens > most:
        raise UsageError(
            f"{prompt_tokens} tokens of prompt and {new_tokens} new ones are beyond the model's {most} positions "
            "(max_position_embeddings): give a shorter prompt or fewer new tokens"
        )


def take_turns(
    generations: Sequence[Generation],
    rounds: int,
    tokens: int,
    seed: int,
    on_token: Mapping[str, OnToken] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Extend every text by `rounds` pieces of `tokens` tokens, in randomized mirrored blocks; skip texts that have ended."""
    by_name = {generation.name: generation for generation in generations}
    total = rounds * len(generations)
    for done, name in enumerate(schedule(list(by_name), rounds, True, seed)):
        if not by_name[name].ended:
            by_name[name].advance(tokens, (on_token or {}).get(name))
        progress(done + 1, total)
