"""The entry point that vLLM calls in each of its processes."""

import logging

from elastickv.vllm.versions import installed_version, minor_version, unsupported_reason

_log = logging.getLogger("vllm.elastickv")
_registered = False


def register() -> None:
    """Register the attention backend, its KV cache dtypes and the window's specification; once a process.

    With a version of vLLM that is not supported it logs one line and changes nothing.
    """
    global _registered
    if _registered:
        return
    _registered = True
    installed = installed_version()
    if installed is None:
        return
    reason = unsupported_reason(installed.version, installed.package)
    if reason is not None:
        _log.warning("ElasticKV is not available: %s", reason)
        return
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from elastickv.vllm import cpu_backend
    from elastickv.vllm.window_manager import register_specs

    register_specs()
    register_backend("ELASTICKV", "elastickv.vllm.attention_backend.ElasticAttentionBackend")
    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, cpu_backend.PATH)
    offered = minor_version(installed.version)
    if offered is not None and offered.named_cache_dtypes:
        from elastickv.vllm.cache_dtypes import register_cache_dtypes

        register_cache_dtypes()
