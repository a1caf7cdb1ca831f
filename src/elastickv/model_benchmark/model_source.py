"""What MODEL may be for `elastickv run`: a checkpoint, or a published shape with random weights."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from types import SimpleNamespace
from typing import Any, Protocol

import torch

from elastickv.errors import UsageError
from elastickv.model_benchmark.memory_estimate import MemoryEstimate, free_bytes
from elastickv.model_benchmark.shapes import Shape, built, shape_named
from elastickv.transformers.model_loading import Checkpoint, Loaded, check_device

_PRINTABLE = range(32, 127)


class ModelSource(Protocol):
    """A model whose parts are read when they are needed.

    Attributes
    ----------
    name : as it was requested.
    config : Transformers' configuration.
    tokenizer : its tokenizer.
    """

    name: str

    @property
    def config(self) -> Any: ...  # noqa: D102

    @property
    def tokenizer(self) -> Any: ...  # noqa: D102

    def load(self, dtype: str, device: str) -> Loaded:
        """Load the weights."""


class ByteTokenizer:
    """The tokenizer of a model with random weights: a prompt's bytes are its tokens, and every token is a printable character.

    Parameters
    ----------
    vocabulary : number of tokens of the model. Of a smaller one than 256, several bytes share a token.
    """

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    def __call__(self, text: str, **_: Any) -> SimpleNamespace:
        """Return the tokens of a text as `input_ids`."""
        return SimpleNamespace(input_ids=[byte % self._vocabulary for byte in text.encode("utf-8", "replace")])

    def decode(self, ids: Iterable[int], **_: Any) -> str:
        """Return a character for each token."""
        return "".join(chr(_PRINTABLE[int(number) % len(_PRINTABLE)]) for number in ids)


class RandomWeights:
    """A published shape, whose weights are random and are made by `load`.

    Parameters
    ----------
    name : such as 'shape:8b'.
    """

    def __init__(self, name: str, shape: Shape) -> None:
        self.name, self._shape = name, shape
        self.config, self.tokenizer = shape.config(), ByteTokenizer(shape.vocabulary)

    def load(self, dtype: str, device: str) -> Loaded:
        """Make the weights on the device.

        Raises
        ------
        UsageError : if they do not fit its memory.
        """
        check_device(device)
        estimate = MemoryEstimate.of_shape(self.name, self._shape, dtype, batch=1)
        estimate.check(1, {"compress": 1.0}, free_bytes(device))
        made = built(self.name, dtype, device)
        return Loaded(made.name, made.model, self.tokenizer)


def open_model(name: str) -> ModelSource:
    """Return the model of a name: a directory, a .gguf file, a hub id, or 'shape:8b' and its like.

    Raises
    ------
    UsageError : if there is none, or a package is missing.
    """
    shape = shape_named(name)
    return Checkpoint(name) if shape is None else RandomWeights(name, shape)


def without_weights(source: ModelSource) -> Any | None:
    """Return the model without memory for its weights, on PyTorch's meta device; None for one that cannot be made so."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(deepcopy(source.config))
    except UsageError:
        raise
    except Exception:  # of a model's own code that needs values
        return None
