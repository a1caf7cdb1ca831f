"""What an engine of vLLM in this process is: versions, device, backend, runner, cache."""

import subprocess
from typing import Any


def engine_environment(core: Any) -> dict[str, Any]:
    """Return what runs, as JSON values: versions, device, backend class of every kind of layer, runner, cache.

    Parameters
    ----------
    core : the engine's `EngineCore`.
    """
    import torch
    import vllm

    config = core.vllm_config
    cuda = config.device_config.device_type == "cuda"
    layers = [layer for layer in config.compilation_config.static_forward_context.values() if hasattr(layer, "attn_backend")]
    backends = {f"{layer.attn_backend.__module__}.{layer.attn_backend.__qualname__}" for layer in layers}
    flash: set[Any] = {getattr(getattr(layer, "impl", None), "vllm_flash_attn_version", None) for layer in layers} - {None}
    cache, groups = config.cache_config, core.scheduler.kv_cache_config.kv_cache_groups
    worker = core.model_executor.driver_worker
    runner = getattr(worker, "worker", worker).model_runner
    return {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "compute_capability": list(torch.cuda.get_device_capability()) if cuda else None,
        "driver": _driver() if cuda else None,
        "backends": sorted(backends),
        "backend_names": sorted({layer.attn_backend.get_name() for layer in layers}),
        "flash_attention": max(flash, default=None),
        "runner": type(runner).__module__,
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        "kv_cache_dtype": cache.cache_dtype,
        "blocks": core.scheduler.kv_cache_config.num_blocks,
        "groups": [
            {
                "spec": type(g.kv_cache_spec).__name__,
                "block_tokens": g.kv_cache_spec.block_size,
                "layers": len(g.layer_names),
            }
            for g in groups
        ],
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip()
