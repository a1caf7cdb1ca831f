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
_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")


@contextmanager
def observed(model: Any, positions: Sequence[int], measure: Callable[[int, LayerInputs], None]) -> Iterator[None]:
    """Run a model's attention exactly and hand every full-attention layer's inputs to `measure`; restores the model on exit.

    The attention function is registered through Transformers' interface; hooks on the decoder layers see the residual stream.
    """
    residual: dict[Any, torch.Tensor] = {}
    here = torch.tensor(positions, device=model.device)

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float | None = None, **rest: Any) -> Any:
        if not rest.get("sliding_window") and not getattr(module, "sliding_window", None) and module in residual:
            sinks = rest.get("s_aux")
            inputs = LayerInputs(
                queries=query[0, :, here].float(),
                keys=key[0].float(),
                values=value[0].float(),
                projection=_projection(module).weight.detach().float(),
                residual=residual[module],
                positions=here,
                scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
                softcap=rest.get("softcap"),
                sink_logits=None if sinks is None else sinks.detach().float(),
                query_products=mean_products(query[0, :, DEFAULT_SINKS:].float(), key.shape[1]),
            )
            measure(module.layer_idx, inputs)
        return _exact(module, query, key, value, mask, scaling, rest)

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


def _projection(module: Any) -> Any:
    return next(getattr(module, name) for name in _PROJECTIONS if hasattr(module, name))
