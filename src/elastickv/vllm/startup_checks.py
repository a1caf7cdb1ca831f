"""What the backend cannot serve, found before the first request: one line each, with the reason and what to use instead.

Configurations are read by the names of their attributes in vLLM 0.32 and 0.33, whose checks of a backend say less than a line
needs. Nothing is imported from vLLM.
"""

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from elastickv.errors import UsageError
from elastickv.recipe import HEAD_DIMS, PAGE_TOKENS, AttentionShape
from elastickv.vllm.drafts import draft_refusals
from elastickv.vllm.serving_options import KEY, ServingOptions
from elastickv.vllm.versions import minor_version

DEVICES = ("cuda", "cpu")
LEAST_CAPABILITY = (8, 0)
WINDOWED_BACKEND = "FLASH_ATTN"
_STOCK_BACKEND = {
    "cuda": "serve it with a stock backend: leave out ElasticKV's `attention_backend` and `kv_cache_dtype`",
    "cpu": f"serve it with the stock backend: leave out {KEY} in `additional_config`",
}
_FUSED_CACHE_WRITES = ("fuse_rope_kvcache", "fuse_qk_norm_rope_kvcache")
# It knows blocks by the names of layers, which say format and window.
_CONNECTOR = "OffloadingConnector"
_ATTENTION_TYPES = {
    "encoder": "is an encoder's",
    "encoder_only": "is an encoder's",
    "encoder_decoder": "attends to an encoder's output",
}


@dataclass(frozen=True)
class Device:
    """The device that serves.

    Attributes
    ----------
    kind : vLLM's name of the platform; 'cuda' and 'cpu' are supported.
    capability : compute capability of a GPU, (9, 0); None on others.
    version : vLLM's version as text, which decides what flags a remedy names.
    batch_invariant : whether VLLM_BATCH_INVARIANT is set.
    """

    kind: str
    capability: tuple[int, int] | None = None
    version: str = "0.33.0"
    batch_invariant: bool = False

    @property
    def stock_backend(self) -> str:
        """What to do to serve without ElasticKV."""
        return _STOCK_BACKEND.get(self.kind, _STOCK_BACKEND["cuda"])


@dataclass(frozen=True)
class LayerArguments:
    """What vLLM passes to the attention implementation of a layer that is to be served.

    Attributes
    ----------
    name : vLLM's name of the layer, or another for people.
    query_heads, kv_heads, head_dim : of this rank's share of the layer.
    value_head_dim : channels of a value; None: as many as of a key.
    attention_type : as in vLLM's `AttentionType`.
    kv_cache_dtype : the layer's; None: the cache's.
    sliding_window : tokens that the layer attends to; None: all.
    logits_soft_cap : as passed; None or 0 is none.
    alibi, sinks : whether the layer has ALiBi slopes, or learned attention sinks.
    shares_cache_of : name of the layer whose cache it reads; None: it has its own.
    """

    name: str
    query_heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int | None = None
    attention_type: str = "decoder"
    kv_cache_dtype: str | None = None
    sliding_window: int | None = None
    logits_soft_cap: float | None = None
    alibi: bool = False
    sinks: bool = False
    shares_cache_of: str | None = None


def check(vllm_config: Any, device: Device, layer: LayerArguments | None = None) -> None:
    """Check a configuration, and a layer if there is one.

    Raises
    ------
    UsageError : with the first of `refusals`.
    """
    for reason in refusals(vllm_config, device, layer):
        raise UsageError(reason)


def refusals(vllm_config: Any, device: Device, layer: LayerArguments | None = None) -> list[str]:
    """Return why a configuration, or a layer in it, cannot be served: one line for each reason.

    Parameters
    ----------
    vllm_config : vLLM's `VllmConfig`.
    """
    reasons = [*_device_refusals(vllm_config, device), *_model_refusals(vllm_config.model_config, device)]
    reasons += [*_cache_refusals(vllm_config), *_parallel_refusals(vllm_config.parallel_config)]
    reasons += [*_compilation_refusals(vllm_config.compilation_config), *draft_refusals(vllm_config)]
    if layer is not None:
        reasons += [*_shape_refusals(layer, device), *_layer_refusals(vllm_config, layer, device)]
    return reasons


def _device_refusals(vllm_config: Any, device: Device) -> Iterator[str]:
    if device.kind not in DEVICES:
        yield f"ElasticKV serves on NVIDIA GPUs and CPUs, and this is {device.kind}: {device.stock_backend}"
    if device.capability is not None and device.capability < LEAST_CAPABILITY:
        have, least = (".".join(map(str, each)) for each in (device.capability, LEAST_CAPABILITY))
        yield f"this GPU has compute capability {have} and serving needs {least} or newer: {device.stock_backend}"
    if device.batch_invariant:
        yield (
            "VLLM_BATCH_INVARIANT asks for sums in one order whatever the batch is, which ElasticKV's have not: unset it, or "
            f"{device.stock_backend}"
        )
    dtype = str(getattr(vllm_config.model_config, "dtype", "")).removeprefix("torch.")
    if device.kind == "cuda" and dtype == "float32":
        yield "the model's dtype is float32, and on GPUs 16 bit is served: give `dtype=bfloat16` or `dtype=float16`"
    options = ServingOptions.parse(getattr(vllm_config, "additional_config", None)) or ServingOptions()
    selects = options.compress is not None and options.select_pages
    if selects and device.kind == "cuda" and not getattr(vllm_config, "use_v2_model_runner", False):
        remedy = ', or give a calibration and "select_pages": false, with which formats alone must reach it'
        yield (
            f"{KEY} option compress={options.compress:g} selects pages, which on GPUs needs vLLM's model runner V2: leave out "
            f"VLLM_USE_V2_MODEL_RUNNER=0, or what vLLM's log names for V2{remedy}"
        )


def _model_refusals(model_config: Any, device: Device) -> Iterator[str]:
    if getattr(model_config, "use_mla", False):
        yield (
            "the model has multi-head latent attention (MLA), whose cache is compressed already and has no keys and values of "
            f"heads: {device.stock_backend}"
        )
    if getattr(model_config, "runner_type", "generate") == "pooling":
        yield (
            "the model is served for pooling, without decode steps, in which smaller pages are faster: to generate with it "
            f"give `runner=generate`, else {device.stock_backend}"
        )
    if getattr(model_config, "is_encoder_decoder", False):
        yield f"the model is an encoder and a decoder, and only decoders are served: {device.stock_backend}"
    if getattr(model_config, "is_hybrid", False):
        yield (
            "the model mixes attention with state-space or linear layers, whose states pad the pages of the same pool: "
            f"{device.stock_backend}"
        )
    if getattr(model_config, "attention_chunk_size", None):
        yield f"layers of the model attend within chunks of {model_config.attention_chunk_size} tokens: {device.stock_backend}"
    if sharing := getattr(getattr(model_config, "hf_text_config", None), "num_kv_shared_layers", None):
        yield f"{sharing} layers of the model read caches of other layers, without windows of theirs: {device.stock_backend}"
    if getattr(model_config, "is_mm_prefix_lm", False):
        yield (
            "the model attends to later tokens within an image, which is not served: for text alone give "
            f"`language_model_only=True`; else {device.stock_backend}"
        )


def _cache_refusals(vllm_config: Any) -> Iterator[str]:
    cache, transfer = vllm_config.cache_config, getattr(vllm_config, "kv_transfer_config", None)
    # vLLM splits a block of several pages for the kernels; it does not join smaller ones. Its own default is replaced later.
    if getattr(cache, "user_specified_block_size", False) and cache.block_size % PAGE_TOKENS:
        yield (
            f"`block_size={cache.block_size}` is not whole pages of {PAGE_TOKENS} tokens: give `block_size={PAGE_TOKENS}`, a "
            "multiple of it, or none"
        )
    if getattr(vllm_config.scheduler_config, "disable_hybrid_kv_cache_manager", False):
        connector = getattr(transfer, "kv_connector", None)
        also = f" or the KV connector {connector}, which cannot have it (vLLM's SupportsHMA)" if connector else ""
        yield (
            "the hybrid KV cache manager is off, so that the window would hold all tokens in 16 bit: leave out "
            f"`disable_hybrid_kv_cache_manager`{also}"
        )
        return
    for connector in _connectors(transfer):
        if connector == "SimpleCPUOffloadConnector":
            yield (
                f"the KV connector {connector} needs blocks to stay in the prefix cache until it has stored them, and those of "
                f"a request with a NaN leave it: use {_CONNECTOR}, or none"
            )
        elif connector != _CONNECTOR:
            yield (
                f"the KV connector {connector} does not tell pages of one format and window from those of another when it "
                f"passes them on: use {_CONNECTOR}, or none"
            )


def _connectors(transfer: Any) -> Iterator[str]:
    """Yield vLLM's own KV connectors of a `KVTransferConfig`; those that a MultiConnector joins instead of it.

    What a connector in a module of the user's does with blocks is for the user to know.
    """
    name = getattr(transfer, "kv_connector", None)
    if name == "MultiConnector":
        for each in (getattr(transfer, "kv_connector_extra_config", None) or {}).get("connectors", []):
            if not each.get("kv_connector_module_path"):
                yield str(each.get("kv_connector"))
    elif name is not None and not getattr(transfer, "kv_connector_module_path", None):
        yield name


def _parallel_refusals(parallel_config: Any) -> Iterator[str]:
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel_config, name, 1) > 1:
            yield (
                f"`{name}={getattr(parallel_config, name)}` splits a request's tokens over GPUs, which a window cannot be: "
                f"give `{name}=1` and split heads with `tensor_parallel_size`"
            )
    if getattr(parallel_config, "enable_dbo", False):
        yield "`enable_dbo=True` runs two halves of a batch at once, and the backend's scratch memory serves one: leave it out"
    elif getattr(parallel_config, "ubatch_size", 0) > 1:
        yield (
            f"`ubatch_size={parallel_config.ubatch_size}` runs parts of a batch at once, and the backend's scratch memory "
            "serves one: leave it out"
        )


def _compilation_refusals(compilation_config: Any) -> Iterator[str]:
    passes = getattr(compilation_config, "pass_config", None)
    for name in _FUSED_CACHE_WRITES:
        if getattr(passes, name, None):
            yield (
                f"`{name}` writes 16-bit keys and values into the cache past ElasticKV: set {name} to false in `pass_config` "
                "of `compilation_config`"
            )


def _shape_refusals(layer: LayerArguments, device: Device) -> Iterator[str]:
    if layer.value_head_dim not in (None, layer.head_dim):
        yield (
            f"layer {layer.name} has keys of {layer.head_dim} and values of {layer.value_head_dim} channels, and pages hold as "
            f"many of both: {device.stock_backend}"
        )
    if layer.head_dim not in HEAD_DIMS:
        accepted = ", ".join(map(str, HEAD_DIMS))
        yield (
            f"layer {layer.name} has heads of {layer.head_dim} channels, and kernels are built for {accepted}: "
            f"{device.stock_backend}"
        )
        return
    try:
        AttentionShape(1, layer.query_heads, layer.kv_heads, layer.head_dim)
    except UsageError as error:
        yield f"layer {layer.name} has no kernel ({error}): {device.stock_backend}"


def _layer_refusals(vllm_config: Any, layer: LayerArguments, device: Device) -> Iterator[str]:
    stock = device.stock_backend
    if layer.attention_type != "decoder":
        what = _ATTENTION_TYPES.get(layer.attention_type, f"has attention of the type {layer.attention_type}")
        yield f"layer {layer.name} {what}, and only decoders are served: {stock}"
    if layer.alibi:
        yield f"layer {layer.name} adds ALiBi slopes to its scores, which no kernel does: {stock}"
    if layer.logits_soft_cap:
        yield f"layer {layer.name} caps its scores at {layer.logits_soft_cap:g}, which no kernel does: {stock}"
    if layer.sinks:
        yield f"layer {layer.name} has learned attention sinks, which no kernel reads: {stock}"
    if layer.shares_cache_of is not None:
        yield f"layer {layer.name} reads the cache of {layer.shares_cache_of}, which has no window for it: {stock}"
    if layer.sliding_window is not None:
        yield _windowed(vllm_config, layer, device)
    cache_dtype = vllm_config.cache_config.cache_dtype
    if layer.kv_cache_dtype not in (None, cache_dtype):
        yield (
            f"layer {layer.name} is exempt from `kv_cache_dtype={cache_dtype}`, and all layers of ElasticKV share one size of "
            f"page: leave it out of `kv_cache_dtype_skip_layers`; for a finer format use {KEY} option layers"
        )


def _windowed(vllm_config: Any, layer: LayerArguments, device: Device) -> str:
    """Return why a layer with a sliding window is refused, with the flags that leave such layers to a stock backend."""
    fact = f"layer {layer.name} attends to a window of {layer.sliding_window} tokens"
    # vLLM sets the cache's window where all layers have it.
    if getattr(vllm_config.cache_config, "sliding_window", None) is not None:
        longest = getattr(vllm_config.model_config, "max_model_len", None)
        if longest is not None and longest <= layer.sliding_window:
            return f"{fact}, and requests have at most {longest}: give `disable_sliding_window=True`, which changes no token"
        return (
            f"{fact}, as all layers do, and there is little to save: give `disable_sliding_window=True` to serve up to "
            f"{layer.sliding_window} tokens without windows; else {device.stock_backend}"
        )
    if device.kind == "cpu":
        return f"{fact}, and on CPUs one backend serves all layers: {device.stock_backend}"
    return f"{fact}, and a stock backend must serve such layers: {windowed_layers_command(vllm_config, device.version)}"


def windowed_layers_command(vllm_config: Any, version: str) -> str:
    """Return the command that leaves layers with a sliding window to a stock backend, as it is typed.

    Parameters
    ----------
    version : vLLM's. Where a KV cache dtype of ours is named, windowed layers must also be exempt from it.
    """
    flags = {"--attention-backend": "ELASTICKV"}
    offered, dtype = minor_version(version), vllm_config.cache_config.cache_dtype
    if offered is not None and offered.named_cache_dtypes and dtype != "auto":
        flags |= {"--kv-cache-dtype": dtype, "--kv-cache-dtype-skip-layers": "sliding_window"}
    flags["--attention-config"] = json.dumps({"backend_per_kind": {"sliding_window": WINDOWED_BACKEND}})
    additional = getattr(vllm_config, "additional_config", None)
    if isinstance(additional, Mapping) and KEY in additional:
        flags["--additional-config"] = json.dumps({KEY: additional[KEY]})
    model = getattr(vllm_config.model_config, "model", "MODEL")
    words = ["vllm", "serve", shlex.quote(model), *(f"{flag} {shlex.quote(value)}" for flag, value in flags.items())]
    if getattr(getattr(vllm_config.model_config, "multimodal_config", None), "language_model_only", False):
        words.append("--language-model-only")
    return " ".join(words)
