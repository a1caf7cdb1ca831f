"""Run a model's attention exactly and pass the inputs of every layer to a measuring function."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from elastickv.errors import UsageError
from elastickv.evaluation.layer_errors import LayerInputs, mean_products
from elastickv.recipe.recipe import DEFAULT_SINKS

NAME = "elastickv_observed"
_FEW = 4
_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")


@contextmanager
def observed(model: Any, positions: Sequence[int], measure: Callable[[int, LayerInputs], None]) -> Iterator[None]:
    """Run a model's attention exactly and hand every full-attention layer's inputs to `measure`; restores the model on exit.

    The attention function is registered through Transformers' interface; hooks on the decoder layers see the residual stream.
    """
    residual: dict[Any, torch.Tensor] = {}
    norms = norms_of_outputs(model)
    here = torch.tensor(positions, device=model.device)

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float | None = None, **rest: Any) -> Any:
        exact = _exact(module, query, key, value, mask, scaling, rest)
        if not rest.get("sliding_window") and not getattr(module, "sliding_window", None) and module in residual:
            sinks = rest.get("s_aux")
            gains, mean_square = through_norm(norms.get(module), module, exact[0][0, here])
            inputs = LayerInputs(
                queries=query[0, :, here].float(),
                keys=key[0].float(),
                values=value[0].float(),
                projection=gains * _projection(module).weight.detach().float(),
                residual=residual[module] * mean_square,
                positions=here,
                scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
                softcap=rest.get("softcap"),
                sink_logits=None if sinks is None else sinks.detach().float(),
                query_products=mean_products(query[0, :, DEFAULT_SINKS:].float(), key.shape[1]),
            )
            measure(module.layer_idx, inputs)
        return exact

    def note(module: Any) -> Callable[..., None]:
        def hook(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            hidden = arguments[0] if arguments else named["hidden_states"]
            residual[module] = hidden[0, here].float().square().sum(-1)

        return hook

    transformers.AttentionInterface.register(NAME, attention)
    transformers.AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.config._attn_implementation
    hooks = []
    try:
        for parent, module in attention_modules(model):
            hooks.append(parent.register_forward_pre_hook(note(module), with_kwargs=True))
        model.set_attn_implementation(NAME)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(before)


def _exact(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float | None, rest: dict[str, Any]) -> Any:
    """Return exact attention: PyTorch's, or where that lacks a soft cap or sinks, one head at a time written out."""
    if rest.get("softcap") is None and rest.get("s_aux") is None:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **rest)
    group, tokens = query.shape[1] // key.shape[1], key.shape[2]
    allowed = torch.ones(query.shape[2], tokens, dtype=torch.bool, device=query.device).tril(tokens - query.shape[2])
    outputs = torch.empty_like(query)
    for head in range(query.shape[1]):
        scores = query[:, head] @ key[:, head // group].mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if rest.get("softcap") is not None:
            scores = rest["softcap"] * torch.tanh(scores / rest["softcap"])
        scores = scores.masked_fill(~(allowed if mask is None else mask[:, 0]), torch.finfo(scores.dtype).min)
        if rest.get("s_aux") is not None:
            extra = rest["s_aux"][head].to(scores.dtype).expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, extra], -1)
        outputs[:, head] = scores.softmax(-1)[..., :tokens] @ value[:, head // group]
    return outputs.transpose(1, 2).contiguous(), None


def attention_modules(model: Any) -> list[tuple[Any, Any]]:
    """Return (decoder layer, attention module) of every layer that has both a layer number and an output projection."""
    named = dict(model.named_modules())
    pairs = []
    for name, module in named.items():
        if hasattr(module, "layer_idx") and any(hasattr(module, projection) for projection in _PROJECTIONS):
            pairs.append((named[name.rpartition(".")[0]], module))
    if not pairs:
        raise UsageError(f"{type(model).__name__} has no attention whose output projection is known: {', '.join(_PROJECTIONS)}")
    return pairs


def norms_of_outputs(model: Any) -> dict[Any, Any]:
    """Return the norm that each attention module's output goes through before it is added to the residual stream, if any.

    Gemma 2 and 3, OLMo 2 and GLM-4 have one. Names do not tell: `post_attention_layernorm` of Llama normalizes the sum. So the
    model reads a few tokens, and the norm is the one whose input is the output.
    """
    outputs: dict[Any, Any] = {}
    norms: dict[Any, Any] = {}
    hooks = []

    def note(module: Any) -> Callable[..., None]:
        def hook(_: Any, arguments: Any, output: Any) -> None:
            outputs[module] = output[0] if isinstance(output, tuple) else output

        return hook

    def compare(module: Any) -> Callable[..., None]:
        def hook(norm: Any, arguments: tuple[Any, ...]) -> None:
            if arguments and arguments[0] is outputs.get(module):
                norms[module] = norm

        return hook

    try:
        for parent, module in attention_modules(model):
            hooks.append(module.register_forward_hook(note(module)))
            normalizing = (child for child in parent.children() if getattr(getattr(child, "weight", None), "ndim", 0) == 1)
            hooks += [child.register_forward_pre_hook(compare(module)) for child in normalizing]
        with torch.inference_mode():
            model(input_ids=torch.zeros((1, _FEW), dtype=torch.long, device=model.device), use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return norms


def through_norm(norm: Any, module: Any, attended: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return by what a norm of the attention's output multiplies a small change of it, and by what it divides its square.

    An RMS norm multiplies channel h by g[h] and divides by the root mean square of the output, which a small change hardly
    changes.

    Parameters
    ----------
    norm : None for none.
    attended : (positions, query_heads, head_dim), what the output projection gets.

    Returns
    -------
    (hidden, 1) gains and (positions,) mean squares; ones without a norm.
    """
    if norm is None:
        return attended.new_ones((1, 1), dtype=torch.float32), attended.new_ones(len(attended), dtype=torch.float32)
    output = _projection(module)(attended.flatten(1))
    gains = norm.weight if isinstance(norm, torch.nn.LayerNorm) else norm(torch.ones_like(output[:1]))[0]
    return gains.detach().float()[:, None], output.float().square().mean(-1).clamp_min(torch.finfo(torch.float32).tiny)


def _projection(module: Any) -> Any:
    return next(getattr(module, name) for name in _PROJECTIONS if hasattr(module, name))
