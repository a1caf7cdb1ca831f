"""The sensitivity of a model's predictions to each layer: what one layer in 4 bits, or with few of its pages, changes.

An error that is measured at a layer's output says how formats of this layer compare, and little of other layers: later layers
ignore much of what some layers write. As in mixed precision for weights (HAWQ-V2, Dong et al. 2019, arXiv 1911.03852), the
error of each layer is therefore multiplied by a sensitivity of the loss to it. Here it is measured: the KL divergence of the
predictions with this layer's keys or values in 4 bits, or with the best eighth of its pages, and everything else exact, for a
unit of the layer's error. Keys and values are measured in 2 bits, too: a layer that hardly matters in 4 bits can matter then.
And they are measured with codes that are chosen by Hessians: what these leave of an error lies in directions that cost the
layer's output little, and later layers may make more of them.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch

from elastickv.evaluation import sessions
from elastickv.evaluation.kv_formats.own_formats import OwnRoundTrip
from elastickv.evaluation.layer_progress import Progress
from elastickv.evaluation.prediction_losses import prediction_losses
from elastickv.evaluation.prefill import Prefill, Tensor, has_attention_everywhere, prefill
from elastickv.evaluation.tensor_codecs import TensorCompensation
from elastickv.recipe.calibration import ROTATED, SENSITIVITY_FORMATS, Smoothing
from elastickv.recipe.recipe import DEFAULT_SINKS, DEFAULT_WINDOW, DENSE, Recipe
from elastickv.recipe.regions import regions
from elastickv.recipe.shape import padded_head_dim

SCORED = 64
PAGES = "pages"
FRACTION = 1 / 8
_SELECTING = Recipe.parse(f"int4,pages={FRACTION},anchor_every=1")


@dataclass(frozen=True)
class RoundedLayer:
    """What decides how a layer's keys and values are stored where they are rotated and rounded by Hessians.

    Attributes
    ----------
    smoothing : of the keys.
    hessians : of keys and of values, (kv_heads, head_dim, head_dim) each.
    """

    smoothing: Smoothing
    hessians: Sequence[Tensor]

    def round_trip(self, measured: str) -> OwnRoundTrip:
        """Return how keys or values are stored and read back where a sensitivity of `SENSITIVITY_FORMATS` is measured."""
        of_values = measured.startswith("values")
        name, rotated, _ = SENSITIVITY_FORMATS[measured].partition(ROTATED)
        hessians = self.hessians[of_values]
        head_dim = padded_head_dim(hessians.shape[-1])
        if not rotated:
            return OwnRoundTrip(name, of_values, head_dim, head_dim, rotated=False, dtype="fp32")
        smoothing, factors = None, None
        if not of_values:
            smoothing = self.smoothing
            factors = torch.tensor(smoothing, dtype=torch.float32).exp2()[:, None]
        added = head_dim - hessians.shape[-1]
        compensation = TensorCompensation.of(torch.nn.functional.pad(hessians, (0, added, 0, added)), True, smoothing)
        return OwnRoundTrip(name, of_values, head_dim, head_dim, True, "fp32", factors, compensation)


def layer_losses(
    model: torch.nn.Module,
    rows: Sequence[Sequence[int]],
    storage: Mapping[int, RoundedLayer],
    progress: Progress | None = None,
) -> Mapping[str, tuple[float, ...]]:
    """Return for each layer the KL divergence in nats a token of its keys, of its values, and of an eighth of its 'pages'.

    Keys and values are stored in the formats of `SENSITIVITY_FORMATS`. The last 64 predictions of each row are scored. Sinks
    and the newest tokens before them stay exact, as in a cache; the values of a token share one scale; pages are selected at
    each step.

    Parameters
    ----------
    rows : token ids, all rows of one length.
    storage : number of a layer with full attention, ascending -> how it is stored: all of them.
    progress : called with (layers done, layers of all rows).
    """
    round_trips = {layer: {name: each.round_trip(name) for name in SENSITIVITY_FORMATS} for layer, each in storage.items()}
    totals = {changed: [0.0] * len(storage) for changed in (*SENSITIVITY_FORMATS, PAGES)}
    for number, row in enumerate(rows):
        start = prefill(model, [row], len(row) - SCORED, SCORED)
        last = torch.tensor([list(row[-SCORED:])])
        exact = _logits(model, sessions.stock(model, start), last)
        for place, layer in enumerate(storage):
            selecting = [_SELECTING if each == layer else DENSE for each in storage]
            stored = sessions.stock(model, _with_stored(start, layer, round_trips[layer]))
            of_formats = _logits(model, stored, last.expand(len(SENSITIVITY_FORMATS), -1))
            of_pages = _logits(model, sessions.recipe_pages(model, selecting, start, others_in_16_bits=False), last)
            for changed, logits in zip(totals, [*of_formats[:, None], of_pages], strict=True):
                losses = prediction_losses(exact, logits, last)
                totals[changed][place] += float(losses[2].mean()) / len(rows)
            if progress is not None:
                progress(number * len(storage) + place + 1, len(rows) * len(storage))
    return {changed: tuple(max(0.0, loss) for loss in losses) for changed, losses in totals.items()}


def _with_stored(start: Prefill, layer: int, round_trips: Mapping[str, OwnRoundTrip]) -> Prefill:
    """Return a prefill of one row once for each of some round trips, with the cold keys or values of a layer read back."""
    split = regions(start.tokens, DEFAULT_SINKS, DEFAULT_WINDOW)
    cold = slice(DEFAULT_SINKS, DEFAULT_SINKS + split.cold)
    count = len(round_trips)

    def repeated(states: Sequence[Tensor]) -> list[Tensor]:
        return [None if exact is None else exact.expand(count, -1, -1, -1) for exact in states]

    keys, values = repeated(start.keys), repeated(start.values)
    changed = [start.keys[layer].repeat(count, 1, 1, 1), start.values[layer].repeat(count, 1, 1, 1)]
    for row, store in enumerate(round_trips.values()):
        rows = changed[store.of_values][row]
        rows[:, cold] = store(rows[:, cold].float())
    keys[layer], values[layer] = changed
    return replace(start, keys=keys, values=values, states={n: _repeated(state, count) for n, state in start.states.items()})


def _repeated(state: Any, count: int) -> Any:
    """Return a layer's state of one row once for each of `count` rows."""
    rows = deepcopy(state)
    rows.reorder_cache(torch.zeros(count, dtype=torch.long))
    return rows


def _logits(model: torch.nn.Module, opened: AbstractContextManager[sessions.DecodingSession], last: Tensor) -> Tensor:
    """Return the (1, tokens, vocabulary) logits of the last tokens in a session after a prefill."""
    # What has a state is followed token by token.
    at_once = last.shape[1] if has_attention_everywhere(model) else 1
    with opened as session:
        return torch.cat([session.read(ids) for ids in last.split(at_once, 1)], 1)
