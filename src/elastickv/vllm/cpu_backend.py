"""What vLLM loads as the CPU's attention backends: ours, or a refusal, where the configuration asks for ElasticKV."""

from pkgutil import resolve_name
from typing import Any

from elastickv.errors import UsageError

NAMES = ("CPU_ATTN", "CPU_MLA", "AMX_MLA")
"""vLLM's backends whose place is taken: the first by ours, the others, which vLLM chooses for MLA, by a refusal."""


def path_of(name: str) -> str:
    """Return what to register as the path of one of the backends."""
    return f"{__name__}.{name}"


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from vllm.config import get_current_vllm_config_or_none
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from elastickv.vllm.serving_options import KEY

    config = get_current_vllm_config_or_none()
    additional = config.additional_config if config is not None else None
    if not (isinstance(additional, dict) and KEY in additional):
        return resolve_name(AttentionBackendEnum[name].value)
    from elastickv.vllm.attention_backend import CpuElasticAttentionBackend
    from elastickv.vllm.attention_impl import serving_device
    from elastickv.vllm.startup_checks import refusals

    if name != "CPU_ATTN":
        raise UsageError("; ".join(refusals(config, serving_device())))
    return CpuElasticAttentionBackend
