"""Which models and layers a cache can serve, and their sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from elastickv.errors import UsageError
from elastickv.recipe.shape import padded_head_dim
from elastickv.transformers.placement import ranks_of

_KEYS = ("k_proj", "qkv_proj", "query_key_value")
STOCK_LAYERS = (DynamicSlidingWindowLayer, LinearAttentionLayer)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model's attention.

    Attributes
    ----------
    model_type : Transformers' name of the architecture.
    elastic : indices of the layers that attend to the whole context.
    query_heads, kv_heads, head_dim : of these layers.
    max_positions : the model's longest context in tokens. None: it has no limit.
    """

    model_type: str
    elastic: tuple[int, ...]
    query_heads: int
    kv_heads: int
    head_dim: int
    max_positions: int | None

    @property
    def stored_head_dim(self) -> int:
        """Channels of a stored head: `head_dim` padded to a size that kernels are built for."""
        return padded_head_dim(self.head_dim)


def device_kind(model: Any) -> str | None:
    """Return the kind of device that holds a model's parameters, such as 'cpu'; None if there are several."""
    kinds = {parameter.device.type for parameter in model.parameters()}
    return kinds.pop() if len(kinds) == 1 else None


def text_config(model: Any) -> Any:
    """Return the configuration of a model's decoder."""
    return model.config.get_text_config(decoder=True)


def stock_layers(config: Any) -> list[Any]:
    """Return the layers of Transformers' own cache for a decoder's configuration."""
    return list(DynamicCache(config=config).layers)


def sizes_of(model: Any) -> Sizes:
    """Return the sizes of a model.

    Raises
    ------
    UsageError : with the reason, for a model that cannot be served.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise UsageError(f"{name} is no Transformers model: give one that AutoModelForCausalLM.from_pretrained returned")
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(f"{name} is an encoder-decoder: ElasticCache serves decoder-only language models")
    text = text_config(model)
    called = f"{name} ({text.model_type})"
    if _is_encoder(text):
        raise UsageError(f"{called} is an encoder and has no KV cache: set is_decoder=True to use it as a decoder")
    if not isinstance(getattr(text, "num_attention_heads", None), int):
        raise UsageError(f"{called} has no KV cache: ElasticCache serves models that decode with attention")
    _check_attention(model, called, text)
    sizes = sizes_of_config(text, called)
    _check_ranks(model, called, sizes.kv_heads)
    return sizes


def sizes_of_config(text: Any, called: str) -> Sizes:
    """Return the sizes of a decoder that has a KV cache.

    Parameters
    ----------
    text : its configuration.
    called : its name in messages.

    Raises
    ------
    UsageError : with the reason, for one that cannot be served.
    """
    elastic = _elastic_layers(called, text)
    heads = {_heads(text, number) for number in elastic or (0,)}
    if len(heads) > 1:
        raise UsageError(
            f"{called}: layers with full attention differ in their heads ({sorted(heads)}), which is not supported"
        )
    query_heads, kv_heads, head_dim = heads.pop()
    if elastic:
        padded_head_dim(head_dim)
    return Sizes(text.model_type, elastic, query_heads, kv_heads, head_dim, _positions(text))


def _is_encoder(text: Any) -> bool:
    """Whether a configuration belongs to an architecture that is an encoder unless `is_decoder` is set."""
    return (
        getattr(text, "is_decoder", None) is False and hasattr(text, "add_cross_attention") and hasattr(text, "type_vocab_size")
    )


def _elastic_layers(called: str, text: Any) -> tuple[int, ...]:
    layers = stock_layers(text)
    shared = getattr(text, "kv_sharing_modes", None) is not None
    for number, layer in enumerate(layers):
        kind = type(layer)
        # A dummy layer stores nothing, because its layer has no attention or reads the cache of another.
        if kind.__name__ == "DummyLayer" and not shared:
            continue
        if kind is not DynamicLayer and kind not in STOCK_LAYERS:
            what = "reads the cache of another" if kind.__name__ == "DummyLayer" else f"is cached as {kind.__name__}"
            raise UsageError(
                f"{called}: layer {number} {what}, which ElasticCache does not support; it serves full attention, and keeps "
                "stock layers for sliding windows and linear attention"
            )
    if not any(isinstance(layer, DynamicLayer) for layer in layers):
        raise UsageError(f"{called} has no KV cache: none of its layers has softmax attention")
    return tuple(number for number, layer in enumerate(layers) if type(layer) is DynamicLayer)


def _heads(text: Any, layer: int) -> tuple[int, int, int]:
    """Return query heads, KV heads and head size of a layer."""
    each = getattr(text, "per_layer_config", None)
    of_layer = text if each is None else each[layer]
    heads = int(of_layer.num_attention_heads)
    kv_heads = getattr(of_layer, "num_key_value_heads", None) or (1 if getattr(of_layer, "multi_query", False) else heads)
    return heads, int(kv_heads), int(getattr(of_layer, "head_dim", None) or of_layer.hidden_size // heads)


def _check_attention(model: Any, called: str, text: Any) -> None:
    if getattr(text, "kv_lora_rank", None):
        raise UsageError(
            f"{called} has latent attention (kv_lora_rank={text.kv_lora_rank}): keys and values differ in "
            "size, and ElasticCache serves those of one head size"
        )
    if getattr(text, "num_kv_shared_layers", None):
        raise UsageError(
            f"{called}: its last {text.num_kv_shared_layers} layers read the cache of others "
            "(num_kv_shared_layers), which ElasticCache does not support"
        )
    default = getattr(model, "_supports_default_dynamic_cache", None)
    if default is not None and not default():
        raise UsageError(f"{called} has its own cache and accepts no other")
    can_set = getattr(model, "_can_set_attn_implementation", None)
    if can_set is None or not can_set():
        raise UsageError(
            f"{called} does not call its attention through Transformers' attention interface: ElasticCache cannot serve it"
        )


def _check_ranks(model: Any, called: str, kv_heads: int) -> None:
    """Check that KV heads divide evenly among the ranks; Transformers would fail only in the middle of a pass."""
    ranks = ranks_of(model).count
    plan = getattr(model, "tp_plan", None) or {}
    cut = any(name.rpartition(".")[2] in _KEYS and style == "colwise" for name, style in plan.items())
    if cut and kv_heads % ranks:
        raise UsageError(
            f"{called} is split over {ranks} ranks and has {kv_heads} KV heads: start a number of processes that divides them"
        )


def _positions(text: Any) -> int | None:
    limit = getattr(text, "max_position_embeddings", None)
    scaling = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, dict) else None
    # Dynamic scaling grows with the context, so there is no limit.
    return None if kind == "dynamic" or not isinstance(limit, int) or limit < 1 else limit
