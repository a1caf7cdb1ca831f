"""Windows of texts for `format_study.py`: an exact prefill, and predictions with other keys and values in its place."""

from collections.abc import Sequence

import torch
from format_study_codecs import Statistics, Tensor
from transformers import DynamicCache

from elastickv.errors import UsageError
from elastickv.evaluation.attention_inputs import observed
from elastickv.evaluation.layer_errors import LayerInputs, hessians
from elastickv.evaluation.texts import Text, windows
from elastickv.recipe.formats import PAGE_TOKENS
from elastickv.recipe.recipe import DEFAULT_SINKS, DEFAULT_WINDOW
from elastickv.transformers.cache_argument import CACHE_ARGUMENT
from elastickv.transformers.model_loading import Loaded
from elastickv.transformers.model_support import text_config


class Windows:
    """Windows of texts after an exact prefill, with the exact predictions of their last tokens.

    Attributes
    ----------
    keys, values : (layers, windows, KV heads, tokens, head_dim), all tokens but those that are scored.
    cold : those that are quantized.
    queries : (layers, windows, KV heads, head_dim, head_dim), E[q q^T] over the query heads of a KV head.
    projections : (layers, KV heads, head_dim, head_dim), W_o^T W_o of the query heads of a KV head.
    """

    def __init__(self, loaded: Loaded, texts: Sequence[Text], count: int, tokens: int, scored: int) -> None:
        self.model, self.cut = loaded.model, windows(texts, loaded.tokenizer, tokens, count)
        self.ids = torch.tensor([window.ids for window in self.cut], device=loaded.model.device)
        self.prefix = tokens - scored
        self.cold = slice(DEFAULT_SINKS, self.prefix - DEFAULT_WINDOW)
        held: list[list[tuple[Tensor, ...]]] = []
        for ids in self.ids:
            layers: dict[int, tuple[Tensor, ...]] = {}

            def take(layer: int, inputs: LayerInputs, layers: dict[int, tuple[Tensor, ...]] = layers) -> None:
                layers[layer] = (inputs.keys, inputs.values, *hessians(inputs))

            with torch.inference_mode(), observed(self.model, range(DEFAULT_SINKS, self.prefix), take):
                self.model(ids[None, : self.prefix], use_cache=False, logits_to_keep=1)
            if sorted(layers) != list(range(text_config(self.model).num_hidden_layers)):
                raise UsageError(f"model {loaded.name}: not every layer attends to the whole context; give another model")
            held.append([layers[layer] for layer in sorted(layers)])
        self.keys, self.values, self.queries, of_windows = (
            torch.stack([torch.stack([layer[number] for layer in window]) for window in held], 1) for number in range(4)
        )
        self.projections = of_windows[:, 0]
        self.exact = self.logits(None, None)

    def rows(self, tensor: str) -> Tensor:
        """Return the cold rows of 'k' or 'v'."""
        return (self.keys if tensor == "k" else self.values)[..., self.cold, :]

    def logits(self, keys: Tensor | None, values: Tensor | None) -> Tensor:
        """Return (windows, positions, vocabulary) with the cold keys and values replaced; None: exact."""
        cache = DynamicCache()
        for layer, pair in enumerate(zip(self.keys, self.values, strict=True)):
            whole = [each.clone() for each in pair]
            for states, new in zip(whole, (keys, values), strict=True):
                if new is not None:
                    states[..., self.cold, :] = new[layer]
            cache.update(*whole, layer)
        with torch.inference_mode():
            return self.model(self.ids[:, self.prefix : -1], use_cache=True, **{CACHE_ARGUMENT: cache}).logits.float()

    def scores(self, keys: Tensor | None, values: Tensor | None) -> tuple[list[float], float]:
        """Return the mean KL of each window in nats a token, and the percentage of tokens whose best prediction stays."""
        kl, same = [], []
        for exact, other in zip(self.exact, self.logits(keys, values), strict=True):
            p, q = exact.double().log_softmax(-1), other.double().log_softmax(-1)
            kl.append((p.exp() * (p - q)).sum(-1).mean().item())
            same.append((exact.argmax(-1) == other.argmax(-1)).double().mean().item())
        return kl, 100 * sum(same) / len(same)


def statistics_of(calibration: Windows) -> dict[str, Statistics]:
    """Return what the calibration knows of 'k' and 'v'."""
    keys = calibration.rows("k")
    paged = keys[..., : keys.shape[-2] // PAGE_TOKENS * PAGE_TOKENS, :].unflatten(-2, (-1, PAGE_TOKENS))
    within = (paged - paged.mean(-2, keepdim=True)).flatten(-3, -2)
    of_queries = calibration.queries.mean(1, keepdim=True)
    return {
        "k": Statistics(_covariance(within), of_queries),
        "v": Statistics(_covariance(calibration.rows("v")), calibration.projections[:, None]),
    }


def _covariance(rows: Tensor) -> Tensor:
    return (rows.mT @ rows).mean(1, keepdim=True) / rows.shape[-2]
