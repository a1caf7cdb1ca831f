"""Generate after one prompt with an elastic cache and, if requested, with the stock cache in turns."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from elastickv.errors import UsageError
from elastickv.evaluation.layer_progress import Progress
from elastickv.evaluation.loading_progress import loading_progress
from elastickv.model_benchmark.compression_start import compression_start
from elastickv.model_benchmark.generation import (
    ELASTIC,
    WARM_UP_TOKENS,
    Generation,
    OnToken,
    Sampling,
    check_positions,
    elastic,
    stock,
    take_turns,
)
from elastickv.model_benchmark.model_source import ModelSource, RandomWeights, without_weights
from elastickv.model_benchmark.records import environment_record, model_record
from elastickv.model_benchmark.speedups import noise_floor, speedup, step_means
from elastickv.results.kinds.model_result import CompressionStart
from elastickv.transformers.config import KeyFormatWarning, UncalibratedWarning
from elastickv.transformers.model_loading import Loaded
from elastickv.transformers.tokenization import prompt_tokens

KIND = "elastickv-run"
VERSION = 1


@dataclass(frozen=True)
class Request:
    """What `PromptRun` generates.

    Attributes
    ----------
    prompt : the text.
    chat : whether to apply the tokenizer's chat template, if it has one.
    tokens : maximum number of new tokens.
    sampling : how a token is chosen.
    wanted : keyword arguments of `ElasticCache.for_model`: compress, recipe, calibration, capture.
    paired : whether the stock cache generates too, in turns.
    piece_tokens : tokens of a turn.
    """

    prompt: str
    chat: bool
    tokens: int
    sampling: Sampling
    wanted: Mapping[str, Any]
    paired: bool
    piece_tokens: int


class PromptRun:
    """A request: checked as far as a model's configuration allows, then loaded, then generated.

    Attributes
    ----------
    starts : from which contexts on the request compresses; None if that is not known before the weights are loaded, or if the
        model has no elastic layers.

    Raises
    ------
    UsageError : if the model is not supported, or prompt and text exceed its positions.
    """

    def __init__(self, source: ModelSource, request: Request, dtype: str) -> None:
        self._source, self._request, self._dtype = source, request, dtype
        self._ids = encoded(source.tokenizer, request.prompt, request.chat)
        self.starts: CompressionStart | None = None
        skeleton = without_weights(source)
        if skeleton is not None:
            check_positions(skeleton, self.prompt_tokens, request.tokens)
            capacity = self.prompt_tokens + request.tokens
            self.starts = compression_start(skeleton, request.wanted, self.prompt_tokens, capacity, dtype)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return int(self._ids.shape[1])

    def load(self, device: str, progress: Progress) -> Loaded:
        """Load the weights, make the caches, and return the model.

        Parameters
        ----------
        progress : called with (done, total) of what is loaded at present.

        Raises
        ------
        UsageError : if they cannot be loaded.
        """
        request, ids = self._request, self._ids
        with loading_progress(progress):
            self._loaded = self._source.load(self._dtype, device)
        mask, model = torch.ones_like(ids), self._loaded.model
        self._stock = stock(model, ids, mask, request.sampling) if request.paired else None
        with warnings.catch_warnings():
            if isinstance(self._source, RandomWeights):  # which have nothing to lose
                warnings.simplefilter("ignore", UncalibratedWarning)
            self._elastic = elastic(model, ids, mask, request.sampling, self.prompt_tokens + request.tokens, request.wanted)
        return self._loaded

    @property
    def _generations(self) -> list[Generation]:
        return [self._elastic] if self._stock is None else [self._stock, self._elastic]

    def warm_up(self) -> None:
        """Run a short prompt through every cache, so that compiling and loading kernels is not timed."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KeyFormatWarning)  # the prompt's own keys are what counts
            for generation in self._generations:
                generation.rehearse(tokens=min(WARM_UP_TOKENS[self._loaded.model.device.type], self._request.tokens))

    def generate(self, on_token: OnToken) -> None:
        """Generate, and call `on_token` with each token of the elastic cache's text."""
        request = self._request
        piece = request.piece_tokens if request.paired else request.tokens
        rounds, rest = divmod(request.tokens, piece)
        listeners = {ELASTIC: on_token}
        take_turns(self._generations, rounds, piece, request.sampling.seed, listeners)
        if rest:
            take_turns(self._generations, 1, rest, request.sampling.seed, listeners)

    def result(self, command: tuple[str, ...], text: str) -> dict[str, Any]:
        """Return the result as JSON values."""
        request = self._request
        # The first piece runs right after the prompt's memory traffic.
        skipped = 1 if len(step_means(self._elastic)) > 2 else 0
        ratio = None if self._stock is None else speedup(self._stock, self._elastic, skipped)
        floor = None if self._stock is None else noise_floor(step_means(self._stock)[skipped:])
        return {
            "kind": KIND,
            "version": VERSION,
            "environment": environment_record(),
            "command": list(command),
            "model": model_record(self._loaded) | {"random_weights": isinstance(self._source, RandomWeights)},
            "compress": request.wanted.get("compress"),
            "recipe": None if request.wanted.get("recipe") is None else str(request.wanted["recipe"]),
            "temperature": request.sampling.temperature,
            "seed": request.sampling.seed,
            "compression": None if self.starts is None else asdict(self.starts),
            "caches": [generation.metrics() for generation in self._generations],
            "pairing": "abba" if request.paired else None,
            "speedup": None if ratio is None else asdict(ratio),
            "noise_floor": None if floor is None else asdict(floor),
            "same_text": None if self._stock is None else self._stock.text_ids() == self._elastic.text_ids(),
            "text": text,
        }


def encoded(tokenizer: Any, text: str, chat: bool) -> torch.Tensor:
    """Return the (1, tokens) ids of a prompt, with the tokenizer's chat template applied if `chat` and if it has one.

    Raises
    ------
    UsageError : if the prompt has no tokens.
    """
    if chat and getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": text}]
        whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # The template writes the special tokens itself.
        ids = tokenizer(whole, add_special_tokens=False, verbose=False).input_ids
    else:
        ids = prompt_tokens(tokenizer, text)
    if not ids:
        raise UsageError("the prompt has no tokens: give a text")
    return torch.tensor([list(ids)])
