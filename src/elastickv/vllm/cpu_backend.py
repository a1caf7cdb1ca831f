"""What vLLM loads as the CPU's attention backend: ours where the configuration asks for ElasticKV, else its own."""

from typing import Any

PATH = f"{__name__}.Selected"


def __getattr__(name: str) -> Any:
    if name != "Selected":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from vllm.config import get_current_vllm_config_or_none
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    from elastickv.vllm.serving_options import KEY

    config = get_current_vllm_config_or_none()
    additional = config.additional_config if config is not None else None
    if isinstance(additional, dict) and KEY in additional:
        from elastickv.vllm.attention_backend import CpuElasticAttentionBackend

        return CpuElasticAttentionBackend
    return CPUAttentionBackend
