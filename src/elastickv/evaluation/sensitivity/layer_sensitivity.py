"""The sensitivity of a model's predictions to each layer: what one layer in 4 bits, or with few of its pages, changes.

An error that is measured at a layer's output says how formats of this layer compare, and little of other layers: later layers
ignore much of what some layers write. As in mixed precision for weights (HAWQ-V2, Dong et al. 2019, arXiv 1911.03852), the
error of each layer is therefore multiplied by a sensitivity of the loss to it. Here it is measured: the KL divergence of the
predictions with this layer's keys or values in 4 bits, or with the best eighth of its pages, and everything else exact, for a
unit of the layer's error. Keys and values are measured in 2 bits, too: a layer that hardly matters in 4 bits can matter then.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from elastickv.evaluation import sessions
from elastickv.evaluation.kv_formats.own_formats import OwnRoundTrip
from elastickv.evaluation.layer_progress import Progress
from elastickv.evaluation.prediction_losses import prediction_losses
from elastickv.evaluation.prefill import Prefill, Tensor, has_attention_everywhere, prefill
from elastickv.recipe.recipe import DEFAULT_SINKS, DEFAULT_WINDOW, DENSE, Recipe
from elastickv.recipe.regions import regions
from elastickv.recipe.shape import padded_head_dim

SCORED = 64
KEYS, VALUES, PAGES = "keys", "values", "pages"
STORED_AS = {KEYS: "int4", VALUES: "int4", f"{KEYS}/int2": "int2", f"{VALUES}/int2": "int2"}
FRACTION = 1 / 8
_SELECTING = Recipe.parse(f"int4,pages={FRACTION},anchor_every=1")


def layer_losses(
    model: torch.nn.Module, rows: Sequence[Sequence[int]], layers: Sequence[int], progress: Progress | None = None
) -> Mapping[str, tuple[float, ...]]:
    """Return for each layer the KL divergence in nats a token of its 'keys', its 'values' and an eighth of its 'pages'.

    Keys and values are stored in `int4`; those of 'keys/int2' and 'values/int2' in `int2`. The last 64 predictions of each row
    are scored. Sinks and the newest tokens before them stay exact, as in a cache; the values of a token share one scale; pages
    are selected at each step.

    Parameters
    ----------
    rows : token ids, all rows of one length.
    layers : numbers of the layers with full attention, ascending: all of them.
    progress : called with (layers done, layers of all rows).
    """
    totals = {changed: [0.0] * len(layers) for changed in (*STORED_AS, PAGES)}
    for number, row in enumerate(rows):
        start = prefill(model, [row], len(row) - SCORED, SCORED)
        last = torch.tensor([list(row[-SCORED:])])
        exact = _logits(model, sessions.stock(model, start), last)
        for place, layer in enumerate(layers):
            selecting = [_SELECTING if each == layer else DENSE for each in layers]
            opened = {changed: sessions.stock(model, _with_stored(start, changed, layer)) for changed in STORED_AS}
            opened[PAGES] = sessions.recipe_pages(model, selecting, start, others_in_16_bits=False)
            for changed, session in opened.items():
                losses = prediction_losses(exact, _logits(model, session, last), last)
                totals[changed][place] += float(losses[2].mean()) / len(rows)
            if progress is not None:
                progress(number * len(layers) + place + 1, len(rows) * len(layers))
    return {changed: tuple(max(0.0, loss) for loss in losses) for changed, losses in totals.items()}


def _with_stored(start: Prefill, changed: str, layer: int) -> Prefill:
    """Return a prefill with the cold keys, or values, of one layer read back from a format of `STORED_AS`."""
    tensor = changed.partition("/")[0]
    states = list(getattr(start, tensor))
    split = regions(start.tokens, DEFAULT_SINKS, DEFAULT_WINDOW)
    cold = slice(DEFAULT_SINKS, DEFAULT_SINKS + split.cold)
    rows = states[layer].clone()
    head_dim = padded_head_dim(rows.shape[-1])
    store = OwnRoundTrip(STORED_AS[changed], tensor == VALUES, head_dim, head_dim, rotated=False, dtype="fp32")
    rows[:, :, cold] = store(rows[:, :, cold].float())
    states[layer] = rows
    return replace(start, keys=states) if tensor == KEYS else replace(start, values=states)


def _logits(model: torch.nn.Module, opened: AbstractContextManager[sessions.DecodingSession], last: Tensor) -> Tensor:
    """Return the (1, tokens, vocabulary) logits of the last tokens in a session after a prefill."""
    # What has a state is followed token by token.
    at_once = last.shape[1] if has_attention_everywhere(model) else 1
    with opened as session:
        return torch.cat([session.read(ids) for ids in last.split(at_once, 1)], 1)
