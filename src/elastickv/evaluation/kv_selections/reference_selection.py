"""What a selection is to an evaluation: which tokens a decode step reads, and the bytes that it reads and stores.

Keys and values are exact 16-bit numbers. The prompt is read by full attention; a selection begins after it. A budget C gives a
selection its size, the largest with which all layers together read at most 1/C of the dense bytes over the decode steps.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from elastickv.errors import UsageError
from elastickv.evaluation.prefill import Tensor
from elastickv.evaluation.recipes_by_ratio import Span
from elastickv.recipe.formats import DENSE_BYTES_PER_ELEMENT


def token_bytes(head_dim: int) -> int:
    """Return the bytes of a token's key and value in one KV head, 16 bits an element."""
    return 2 * head_dim * DENSE_BYTES_PER_ELEMENT


@dataclass(frozen=True)
class LayerPrompt:
    """A prompt in one layer, of one sequence, as full attention read it.

    Attributes
    ----------
    queries : (1, query_heads, tokens, head_dim), keys, values : (1, kv_heads, tokens, head_dim), in the model's dtype.
    scaling : factor on the products of queries and keys.
    softcap : cap of the scores, or None.
    sinks : (query_heads,) scores of attention sinks, or None.
    module : the model's attention module; arguments : those of its call by name, `hidden_states` among them.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scaling: float
    softcap: float | None
    sinks: Tensor | None
    module: Any
    arguments: dict[str, Any]

    def weights(self, first: int, end: int) -> Tensor:
        """Return the attention of queries `first` to before `end`: (kv_heads, group, queries, tokens) float32."""
        tokens, heads = self.keys.shape[2], self.keys.shape[1]
        queries = self.queries[0, :, first:end].float().unflatten(0, (heads, -1))
        products = queries @ self.keys[0, :, None].float().mT * self.scaling
        earlier = torch.ones(end - first, tokens, dtype=torch.bool, device=products.device).tril(first)
        return attention_weights(products, earlier, self.softcap, self.sinks)


def attention_weights(products: Tensor, seen: Tensor, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Return the attention of queries to the tokens that they see.

    Parameters
    ----------
    products : (..., kv_heads, group, queries, tokens) scaled products of queries and keys.
    seen : bool, of a shape that broadcasts to it.
    softcap : cap of the scores, or None.
    sinks : (query_heads,) scores of attention sinks, or None.
    """
    scores = products if softcap is None else softcap * (products / softcap).tanh()
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is None:
        return scores.softmax(-1)
    extra = sinks.to(scores).view(*scores.shape[-4:-2], 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, extra], -1).softmax(-1)[..., :-1]


class LayerSelection(ABC):
    """What decode steps read in one layer, of all rows."""

    @abstractmethod
    def select(self, query: Tensor, keys: Tensor) -> Tensor:
        """Return what a step reads: bool (rows, kv_heads, tokens), at least its own token, the last one.

        Parameters
        ----------
        query : (rows, kv_heads, group, head_dim) float32.
        keys : (rows, kv_heads, tokens, head_dim) float32, those that the layer has evicted among them.
        """

    def attended(self, weights: Tensor) -> None:  # noqa: B027
        """Take the step's attention, (rows, kv_heads, group, tokens) float32; most selections need none of it."""


class ReferenceSelection(ABC):
    """A published selection.

    Attributes
    ----------
    name : as `elastickv eval` takes it.
    source : the publication, and the repository and file that were followed.
    unit : what a size counts: tokens or pages.
    least : the smallest size.
    dense_layers : so many of a model's first layers read everything, but never more than half of them.
    """

    name: str
    source: str
    unit: str = "tokens"
    least: int = 1
    dense_layers: int = 0

    @abstractmethod
    def read_bytes(self, size: int, tokens: int, prompt: int, head_dim: int) -> int:
        """Return the bytes that one KV head reads in the step that has `tokens` tokens, its own included."""

    @abstractmethod
    def stored_bytes(self, size: int, tokens: int, prompt: int, head_dim: int) -> int:
        """Return the bytes that one KV head holds in that step."""

    @abstractmethod
    def layer(self, size: int, prompt_scores: Tensor | None) -> LayerSelection:
        """Return the selection of a layer; `prompt_scores` are (rows, kv_heads, tokens), or None where none are needed."""

    def prepare(self, model: Any) -> None:  # noqa: B027
        """Check that the selection can run with a model, before anything is measured.

        Raises
        ------
        UsageError : if it can't.
        """


class PromptScoredSelection(ReferenceSelection):
    """A selection that needs scores of the prompt's tokens.

    Attributes
    ----------
    scores_for_size : whether the scores depend on the size.
    """

    scores_for_size: bool = False

    @abstractmethod
    def prompt_scores(self, size: int, prompt: LayerPrompt) -> Tensor:
        """Return the scores of a prompt's tokens: (kv_heads, tokens)."""


@dataclass(frozen=True)
class SelectionPlan:
    """A selection under a budget.

    Attributes
    ----------
    compress : C.
    dense_layers : how many of the first layers read everything.
    bytes_read, dense_bytes : of one KV head of every layer, summed over the span.
    bytes_stored : of one KV head of every layer in the span's last step.
    """

    selection: ReferenceSelection
    compress: float
    size: int
    dense_layers: int
    bytes_read: int
    dense_bytes: int
    bytes_stored: int


def plan_selection(selection: ReferenceSelection, compress: float, span: Span, layers: int, head_dim: int) -> SelectionPlan:
    """Return a selection with the largest size that meets a budget.

    Parameters
    ----------
    span : the decode steps after a prompt of `span.first` tokens.
    layers : those with full attention.

    Raises
    ------
    UsageError : if the smallest size reads too much.
    """
    dense_layers = min(selection.dense_layers, layers // 2)
    steps = range(span.first + 1, span.first + span.steps + 1)
    dense = token_bytes(head_dim) * sum(steps)

    def read(size: int) -> int:
        selected = sum(selection.read_bytes(size, tokens, span.first, head_dim) for tokens in steps)
        return dense_layers * dense + (layers - dense_layers) * selected

    def fits(size: int) -> bool:
        return compress * read(size) <= layers * dense

    low, high = selection.least, steps[-1]
    if low > high or not fits(low):
        raise UsageError(
            f"selection {selection.name} cannot read 1/{compress:g} of {span.first} tokens: give a smaller C or a longer "
            "context, or leave it out"
        )
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    held = selection.stored_bytes(low, steps[-1], span.first, head_dim)
    stored = dense_layers * token_bytes(head_dim) * steps[-1] + (layers - dense_layers) * held
    return SelectionPlan(selection, compress, low, dense_layers, read(low), layers * dense, stored)
