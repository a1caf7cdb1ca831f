"""Any scorer of kvpress: the prompt's tokens with its best scores stay.

NVIDIA/kvpress, `kvpress/presses/scorer_press.py`: `ScorerPress.score(module, hidden_states, keys, values, attentions, kwargs)`
returns (batch, kv_heads, tokens) scores of a prompt, once. A press scores no decode step, so these are evictions. kvpress is
installed by the user.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from elastickv.errors import UsageError
from elastickv.evaluation.kv_selections.one_off_eviction import OneOffEviction
from elastickv.evaluation.kv_selections.prompt_observation import prompt_scores
from elastickv.evaluation.kv_selections.reference_selection import LayerPrompt
from elastickv.evaluation.prefill import Prefill, Tensor
from elastickv.transformers.cache_argument import cache_in

PREFIX = "kvpress:"
_TRIED_TOKENS = 256
_NEED_ATTENTION = ("ObservedAttentionPress",)


class KvpressScorer(OneOffEviction):
    """A press with its own defaults, by the name of its class.

    Raises
    ------
    UsageError : if kvpress can't be imported, or has no such scorer.
    """

    scores_for_size = True

    def __init__(self, press: str) -> None:
        self.name = PREFIX + press
        self.source = f"NVIDIA/kvpress, {press}"
        self._press = _scorer(press)
        self._needs_attention = press in _NEED_ATTENTION
        self._rotary: Any = None

    def prepare(self, model: Any) -> None:
        """Let the press see the model, and score a short prompt.

        Raises
        ------
        UsageError : if the press refuses the model or the prompt.
        """
        self._rotary = next((module for name, module in model.named_modules() if name.endswith("rotary_emb")), None)
        try:
            self._press.post_init_from_model(model)
        except Exception as error:  # A press may raise anything.
            raise UsageError(
                f"selection {self.name} cannot begin with {type(model).__name__} ({_one_line(error)}): leave it out"
            ) from error
        tried = Prefill([], [], None, [[0] * _TRIED_TOKENS])
        prompt_scores(model, tried, lambda prompt: self.prompt_scores(_TRIED_TOKENS // 2, prompt))

    def prompt_scores(self, size: int, prompt: LayerPrompt) -> Tensor:
        """Return the press's scores under the ratio that leaves `size` tokens.

        Raises
        ------
        UsageError : if the press refuses the prompt.
        """
        tokens, module = prompt.keys.shape[2], prompt.module
        arguments = prompt.arguments | {"past_key_values": cache_in(prompt.arguments)}
        # kvpress leaves int(tokens * (1 - ratio)) tokens: half a token more than `size` is safe from rounding.
        self._press.compression_ratio = max(0.0, 1 - (min(size, tokens) + 0.5) / tokens)
        attention = prompt.weights(0, tokens).flatten(0, 1)[None].to(prompt.keys.dtype) if self._needs_attention else None
        try:
            with _rotary_embedding(module, self._rotary):
                scores = self._press.score(module, arguments["hidden_states"], prompt.keys, prompt.values, attention, arguments)
        except Exception as error:  # A press may raise anything.
            raise UsageError(
                f"selection {self.name} cannot score {tokens} tokens of {type(module).__name__} "
                f"({_one_line(error)}): leave it out"
            ) from error
        if scores.shape != prompt.keys.shape[:3]:
            raise UsageError(
                f"selection {self.name} returns scores of shape {tuple(scores.shape)}, not {tuple(prompt.keys.shape[:3])}: "
                "leave it out"
            )
        return scores[0]


@contextmanager
def _rotary_embedding(module: Any, rotary: Any) -> Iterator[None]:
    """Give an attention module the model's rotary embedding, where kvpress looks for it."""
    if rotary is None or hasattr(module, "rotary_emb"):
        yield
        return
    module.rotary_emb = rotary
    try:
        yield
    finally:
        del module.rotary_emb


def _scorer(press: str) -> Any:
    if find_spec("kvpress") is None:
        raise UsageError(
            f"selection {PREFIX}{press} needs kvpress: pip install cachetools datasets fire, then "
            "pip install --no-deps kvpress, which asks for an older Transformers"
        )
    try:
        with _same_attention_functions():
            kvpress = import_module("kvpress")
    except Exception as error:  # What another package does at import is not ours.
        raise UsageError(
            f"selection {PREFIX}{press}: kvpress cannot be imported ({_one_line(error)}): install a release that fits this "
            "Transformers"
        ) from error
    scorers = _scorers(kvpress)
    if press not in scorers:
        accepted = ", ".join(PREFIX + name for name in sorted(scorers))
        raise UsageError(f"selection {PREFIX}{press} is no scorer of kvpress: choose {accepted}")
    try:
        return scorers[press]()
    except (AssertionError, TypeError, ValueError) as error:
        raise UsageError(f"selection {PREFIX}{press} cannot be made without arguments ({_one_line(error)})") from error


@contextmanager
def _same_attention_functions() -> Iterator[None]:
    """Put back Transformers' attention functions, which kvpress wraps for presses that evict no tokens but mask them."""
    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    try:
        yield
    finally:
        for name, function in before.items():
            if ALL_ATTENTION_FUNCTIONS[name] is not function:
                del ALL_ATTENTION_FUNCTIONS[name]
                if ALL_ATTENTION_FUNCTIONS.get(name) is not function:
                    ALL_ATTENTION_FUNCTIONS[name] = function


def _scorers(kvpress: Any) -> dict[str, Any]:
    """Return the presses that score tokens and leave it to kvpress to evict those with the lowest scores, by name."""
    base: Any = kvpress.ScorerPress
    kinds: list[Any] = [kind for kind in vars(kvpress).values() if isinstance(kind, type) and issubclass(kind, base)]
    return {kind.__name__: kind for kind in kinds if kind.score is not base.score and kind.compress is base.compress}


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
