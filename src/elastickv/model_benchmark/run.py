"""One prompt through a model with an elastic cache, and with the stock cache beside it if asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from elastickv.benchmark.environment import environment
from elastickv.errors import UsageError
from elastickv.model_benchmark.cache_metrics import read_weights_bytes
from elastickv.model_benchmark.generation import (
    ELASTIC,
    Generation,
    Heard,
    Sampling,
    elastic,
    noise_floor,
    speedup,
    step_means,
    stock,
    take_turns,
)
from elastickv.transformers.model_loading import Loaded
from elastickv.transformers.model_support import sizes_of

KIND = "elastickv-run"
VERSION = 1
# Beyond sinks and window, so that pages are stored and read; steps enough for what is compiled at one and captured at another.
WARM_UP_PROMPT, WARM_UP_TOKENS = 192, 6


@dataclass(frozen=True)
class Request:
    """What to generate.

    Attributes
    ----------
    prompt : the text.
    chat : whether a tokenizer that has a chat template applies it.
    tokens : to generate at most.
    sampling : how a token is chosen.
    wanted : what `ElasticCache.for_model` takes: compress, recipe, calibration, capture.
    paired : whether the stock cache generates too, taking turns.
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
    """A request made ready.

    Raises
    ------
    UsageError : if the model cannot be served, or prompt and text are beyond its positions.
    """

    def __init__(self, loaded: Loaded, request: Request) -> None:
        self._loaded, self._request = loaded, request
        ids = encoded(loaded.tokenizer, request.prompt, request.chat)
        mask, model = torch.ones_like(ids), loaded.model
        self._stock = stock(model, ids, mask, request.sampling) if request.paired else None
        self._elastic = elastic(model, ids, mask, request.sampling, ids.shape[1] + request.tokens, request.wanted)

    @property
    def _generations(self) -> list[Generation]:
        return [self._elastic] if self._stock is None else [self._stock, self._elastic]

    def warm_up(self) -> None:
        """Run a short prompt through every cache, so that what is compiled or loaded once is not timed."""
        for generation in self._generations:
            generation.rehearse(WARM_UP_PROMPT, WARM_UP_TOKENS)

    def generate(self, heard: Heard) -> None:
        """Generate; `heard` is given each token of the elastic cache's text."""
        request = self._request
        piece = request.piece_tokens if request.paired else request.tokens
        rounds, rest = divmod(request.tokens, piece)
        told = {ELASTIC: heard}
        take_turns(self._generations, rounds, piece, request.sampling.seed, told)
        if rest:
            take_turns(self._generations, 1, rest, request.sampling.seed, told)

    def result(self, command: tuple[str, ...], text: str) -> dict[str, Any]:
        """Return the receipt as JSON values."""
        request = self._request
        # The first piece has the prompt's memory traffic behind it.
        skipped = 1 if len(step_means(self._elastic)) > 2 else 0
        ratio = None if self._stock is None else speedup(self._stock, self._elastic, skipped)
        floor = None if self._stock is None else noise_floor(self._stock, skipped)
        return {
            "kind": KIND,
            "version": VERSION,
            "environment": environment_record(),
            "command": list(command),
            "model": described(self._loaded),
            "compress": request.wanted.get("compress"),
            "recipe": None if request.wanted.get("recipe") is None else str(request.wanted["recipe"]),
            "temperature": request.sampling.temperature,
            "seed": request.sampling.seed,
            "caches": [generation.receipt() for generation in self._generations],
            "pairing": "abba" if request.paired else None,
            "speedup": None if ratio is None else asdict(ratio),
            "noise_floor": None if floor is None else asdict(floor),
            "same_text": None if self._stock is None else self._stock.text_ids() == self._elastic.text_ids(),
            "text": text,
        }


def encoded(tokenizer: Any, text: str, chat: bool) -> torch.Tensor:
    """Return the (1, tokens) ids of a prompt, through the tokenizer's chat template where it has one and `chat` is asked for.

    Raises
    ------
    UsageError : if there are none.
    """
    if chat and getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": text}]
        whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # The template writes the special tokens itself.
        ids = tokenizer(whole, add_special_tokens=False, verbose=False).input_ids
    else:
        ids = tokenizer(text, verbose=False).input_ids
    if not ids:
        raise UsageError("the prompt has no tokens: give a text")
    return torch.tensor([list(ids)])


def described(loaded: Loaded) -> dict[str, Any]:
    """Return what a result says of a model."""
    model, sizes = loaded.model, sizes_of(loaded.model)
    return {
        "name": loaded.name,
        "type": sizes.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "device_name": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else None,
        "weights_bytes": sum(weight.nbytes for weight in model.parameters()),
        "read_weights_bytes": read_weights_bytes(model),
        "elastic_layers": len(sizes.elastic),
        "query_heads": sizes.query_heads,
        "kv_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
    }


def environment_record() -> dict[str, Any]:
    """Return what a result was measured with."""
    found = environment()
    found["versions"] |= {"transformers": _version("transformers")}
    return found | {"torch_threads": torch.get_num_threads()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
