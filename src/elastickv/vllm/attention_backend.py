"""The attention backend that vLLM selects by name."""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout, KVQuantMode

from elastickv.recipe.formats import PAGE_TOKENS
from elastickv.vllm.attention_impl import ElasticAttentionImpl, serving_device
from elastickv.vllm.model_setup import ModelSetup
from elastickv.vllm.startup_checks import refusals
from elastickv.vllm.step_metadata import PageMetadataBuilder


class ElasticAttentionBackend(AttentionBackend):
    """Attention to low-bit pages and an exact window, on CUDA."""

    # Claims to support what vLLM asks about: where it does not, `startup_checks` refuses with a reason and a remedy.
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = []

    @staticmethod
    def get_name() -> str:
        """Return the name under which the plug-in registers the backend."""
        return "ELASTICKV"

    @staticmethod
    def get_impl_cls() -> type[ElasticAttentionImpl]:
        """Return the class of a layer's attention."""
        return ElasticAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[PageMetadataBuilder]:
        """Return the builder of a step's metadata."""
        return PageMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Return the tokens of a block: one page."""
        return [PAGE_TOKENS]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Return the layout in which the page of one KV head is contiguous."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Claim to support windows: `startup_checks` names the flags that give such layers to another backend."""
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        """Claim to support learned sinks: `startup_checks` refuses them."""
        return True

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """Claim to support attention to later tokens of an image: `startup_checks` refuses it."""
        return True

    @classmethod
    def supports_rswa(cls) -> bool:
        """Claim to support a window of generated tokens: `ModelSetup` gives one that covers all, to learn prompts' lengths."""
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Ask for the number of tokens of each request on the host: rows of drafts find their request by it."""
        return False

    @classmethod
    def validate_configuration(cls, *arguments: Any, **named: Any) -> list[str]:
        """Return why the configuration cannot be served: in our words where we have them, which say what to do."""
        config = get_current_vllm_config_or_none()
        own = refusals(config, serving_device()) if config is not None and config.model_config is not None else []
        return own or super().validate_configuration(*arguments, **named)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Return the specification of pages: a slab of bytes for each KV head."""
        setup = ModelSetup.newest()
        assert setup is not None, "the model's layers are built before their caches"
        # vLLM also asks what layers in 16 bit, which `kv_cache_dtype_skip_layers` names, would take: they stay as they are.
        dense = setup.kv_cache_dtype != "auto" and spec.kv_quant_mode == KVQuantMode.NONE
        if dense or spec.state_content_bytes is not None:
            return spec
        content = setup.slab_bytes(spec.head_size) // PAGE_TOKENS
        return replace(spec, dtype=torch.uint8, kv_quant_mode=KVQuantMode.NONE, state_content_bytes=content)


class CpuElasticAttentionBackend(ElasticAttentionBackend):
    """The same on the CPU, where vLLM has one backend, whose place it takes."""

    @staticmethod
    def get_name() -> str:
        """Return the name of the backend whose place it takes."""
        return "CPU_ATTN"
