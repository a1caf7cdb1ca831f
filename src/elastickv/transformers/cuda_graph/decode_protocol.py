"""What captured decode needs of a model cache and its layers, and what a pass reports while it is captured."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from elastickv.transformers.layer_storage import Backends, LayerStorage
from elastickv.transformers.padding import Padding


class DecodeLayer(Protocol):
    """A layer whose decodes are split into host work and a step that only queues device work.

    Attributes
    ----------
    padding : the positions so far, the same in every layer.
    store : the stored tokens, or None before the prompt is stored.
    capped : whether the model caps its scores; None until the layer has attended.
    """

    padding: Padding
    store: LayerStorage | None
    capped: bool | None

    @property
    def launch_key(self) -> Hashable:
        """What a graph of the layer's step depends on: a new key needs a new graph."""

    @property
    def check_is_due(self) -> bool:
        """Whether it is time to check stored values for NaNs and infinities."""

    def end_step(self) -> None:
        """Count the token that the step stored."""

    def raise_non_finite(self) -> None:
        """Raise NonFiniteError if a NaN or infinity was stored."""


class DecodeCache(Protocol):
    """A model cache whose decodes can be captured."""

    layers: list[Any]

    @property
    def elastic_layers(self) -> Sequence[DecodeLayer]:
        """The layers that store tokens in a backend."""

    @property
    def backends(self) -> Backends:
        """Where the layers are stored."""

    @property
    def has_room(self) -> bool:
        """Whether another token is expected and fits the allocated memory."""

    def begin_step(self) -> None:
        """Prepare all elastic layers for one more token a row."""

    def end_step(self, layers: Sequence[DecodeLayer]) -> None:
        """Count the tokens that `layers` have stored."""

    def rollback(self) -> None:
        """Undo steps that were queued and not counted."""


@dataclass
class Recording:
    """A pass in which layers queue a decode without counting it.

    Attributes
    ----------
    queued : the layers that have queued their step, in order.
    length_read : whether the model read the number of tokens: a replay would keep using this pass's number.
    """

    queued: list[DecodeLayer] = field(default_factory=list)
    length_read: bool = False
