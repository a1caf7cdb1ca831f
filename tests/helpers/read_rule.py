"""A Llama in plain PyTorch whose attention reads as the serving backend does, and how answers are compared with it.

All tokens of a sequence are known beforehand; so is, for each, from which token on there was a window.
"""

import numpy as np

from elastickv.recipe import Recipe
from tests.helpers.served_llama import Sizes

BAD = 1e-2  # a chosen token whose logit is farther than this below the greatest was not the answer
NEAR = 2e-2  # by how much one number's other code moves log-probabilities


class PlainLlama:
    """The model of a set of weights.

    Parameters
    ----------
    weights : tensors by the names of the model's file.
    recipe : formats of pages; None: all tokens are exact.
    layers, smoothing : formats and smoothing of single layers, by number.
    exact_tokens : R.
    rounding : dtype to which queries, keys and values are rounded; the rest is computed in `dtype`.
    """

    def __init__(
        self, weights, recipe="int4", exact_tokens=64, layers=None, smoothing=None, sizes=None, rounding=None, dtype="float64"
    ):
        import torch

        from benchmarks.read_rule import ReadRule

        self.torch, self.sizes = torch, sizes or Sizes()
        formats = [(layers or {}).get(layer, recipe) for layer in range(self.sizes.layers)]
        self.rules = [
            ReadRule(
                each := Recipe.parse(text or "dense"),
                exact_tokens,
                smoothing=(smoothing or {}).get(layer),
                anchor_offset=each.layer_anchor_offset(layer, len(formats)),
            )
            for layer, text in enumerate(formats)
        ]
        self.dtype, self.rounding = getattr(torch, dtype), rounding
        self.weights = {name: tensor.to(self.dtype) for name, tensor in weights.items()}

    def logits(self, tokens, window_first=None, prompt=None):
        """Return the logits after each token, (tokens, vocabulary).

        `window_first` holds for each token the first one that had a block of the window when it was computed; those before it
        were read from pages. `prompt` is how many tokens read every page where a recipe selects pages; None: all do.
        """
        torch = self.torch
        tokens = torch.as_tensor(tokens)
        first = None if window_first is None else torch.as_tensor(np.asarray(window_first))[: len(tokens)]
        x = self.weights["model.embed_tokens.weight"][tokens]
        for layer in range(self.sizes.layers):
            named = {
                name.removeprefix(f"model.layers.{layer}.").removesuffix(".weight"): tensor
                for name, tensor in self.weights.items()
                if name.startswith(f"model.layers.{layer}.")
            }
            x = x + self.attention(self.norm(x, named["input_layernorm"]), named, self.rules[layer], first, prompt)
            inner = self.norm(x, named["post_attention_layernorm"])
            gate = torch.nn.functional.silu(inner @ named["mlp.gate_proj"].T)
            x = x + (gate * (inner @ named["mlp.up_proj"].T)) @ named["mlp.down_proj"].T
        return self.norm(x, self.weights["model.norm.weight"]) @ self.weights["lm_head.weight"].T

    def norm(self, x, weight):
        return x * (x.square().mean(-1, keepdim=True) + self.sizes.epsilon).rsqrt() * weight

    def rotate(self, x):
        """Rotary position embedding (Su et al. 2021) of (tokens, heads, head_dim): the halves of a head are the pairs."""
        torch, half = self.torch, self.sizes.head_dim // 2
        frequency = self.sizes.theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(len(x), dtype=torch.float64)[:, None, None] * frequency
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def rounded(self, x):
        return x if self.rounding is None else x.to(getattr(self.torch, self.rounding)).to(x.dtype)

    def attention(self, x, named, rule, window_first, prompt=None):
        sizes, count = self.sizes, len(x)
        query, key, value = (
            (x @ named[f"self_attn.{name}_proj"].T).view(count, -1, sizes.head_dim) for name in ("q", "k", "v")
        )
        query, key, value = self.rounded(self.rotate(query)), self.rounded(self.rotate(key)), self.rounded(value)
        heads = (each.transpose(0, 1).contiguous() for each in (query, key, value))
        output = rule.attend(*heads, sizes.head_dim**-0.5, window_first, prompt)
        return self.rounded(output.transpose(0, 1).reshape(count, -1)) @ named["self_attn.o_proj"].T


def compare(logits, prompt_tokens, chosen, logprobs=None):
    """Compare the answer of an engine with the logits of the sequence; return bad tokens and log-probability differences.

    Parameters
    ----------
    logits : (tokens, vocabulary) of prompt and answer, as `PlainLlama.logits` returns them.
    chosen : tokens of the answer.
    logprobs : their log-probabilities by the engine.

    Returns
    -------
    bad : how many chosen tokens have a logit more than `BAD` under the greatest.
    differences : (len(chosen),) float64, absolute.
    """
    import torch

    rows = logits[prompt_tokens - 1 : prompt_tokens - 1 + len(chosen)].double()
    index = torch.as_tensor(list(chosen))[:, None]
    bad = int((rows.max(-1).values - rows.gather(1, index)[:, 0] > BAD).sum())
    if logprobs is None:
        return bad, None
    expected = rows.log_softmax(-1).gather(1, index)[:, 0]
    return bad, (expected - torch.as_tensor(list(logprobs), dtype=torch.float64)).abs().numpy()


def logits_of(model, answer):
    """Return the logits after each token of an answer's sequence, each as it was when the token after it was chosen.

    A preempted request is computed again; its next tokens may find less of the window than those before them did.
    """
    import torch

    rows = []
    for first in (*answer.before_preemptions, answer.window_first):
        count, done = min(len(first), len(answer.sequence)), sum(map(len, rows))
        if count > done:
            rows.append(model.logits(answer.sequence[:count], first, len(answer.prompt))[done:])
    return torch.cat(rows)


def follows(model, answer, greedy=True, window_first=True):
    """Return why an answer is not the model's, or None.

    A number may be rounded to another code where the engine adds in another order: a few tokens of a sequence may show it.
    """
    logits = logits_of(model, answer) if window_first else model.logits(answer.sequence, prompt=len(answer.prompt))
    bad, differences = compare(logits, len(answer.prompt), answer.tokens, answer.logprobs)
    count = len(answer.tokens)
    if len(answer.logprobs) != count or len(answer.sequence) > len(answer.window_first):
        return f"{len(answer.logprobs)} log-probabilities, {len(answer.window_first)} computed tokens, answer of {count}"
    if greedy and bad > 2 + count // 50:
        return f"{bad} of {count} tokens are bad, the first differences are {differences[:8]}"
    if np.quantile(differences, 0.8) > NEAR:
        return f"{np.mean(differences > NEAR):.0%} of {count} log-probabilities differ, the first by {differences[:8]}"
    return None


def disagreement(model, answer, other, tie=0.1):
    """Return where two answers to one prompt part although the model prefers one of the tokens, or None."""
    if len(answer.tokens) != len(other.tokens):
        return f"{len(answer.tokens)} and {len(other.tokens)} tokens"
    for number, (token, another) in enumerate(zip(answer.tokens, other.tokens, strict=True)):
        if token != another:
            logits = logits_of(model, answer)[len(answer.prompt) - 1 + number]
            gap = float(abs(logits[token] - logits[another]))
            return None if gap < tie else f"token {number} is {token} and {another}, whose logits are {gap:.3f} apart"
    return None
