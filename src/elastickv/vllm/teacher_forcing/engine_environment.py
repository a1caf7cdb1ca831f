"""What an engine of vLLM in this process is: versions, device, backend, runner, cache."""

import subprocess
from typing import Any


def engine_environment(core: Any) -> dict[str, Any]:
    """Return what runs, as JSON values: versions, device, backend class of every kind of layer, runner, ranks, cache.

    Parameters
    ----------
    core : the engine's `EngineCore`.
    """
    import torch
    import vllm

    config, of_scheduler = core.vllm_config, core.scheduler.kv_cache_config
    # Ranks differ in their heads alone. Pipeline stages have layers of the same kinds, unless a model is made otherwise.
    of_rank = core.model_executor.collective_rpc(worker_environment)[0]
    return {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        **of_rank,
        "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
        "pipeline_parallel_size": config.parallel_config.pipeline_parallel_size,
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "kv_cache_dtype": config.cache_config.cache_dtype,
        "blocks": of_scheduler.num_blocks,
        "groups": [
            {
                "spec": type(g.kv_cache_spec).__name__,
                "block_tokens": g.kv_cache_spec.block_size,
                "layers": len(g.layer_names),
            }
            for g in of_scheduler.kv_cache_groups
        ],
    }


def worker_environment(worker: Any) -> dict[str, Any]:
    """Return what only the process that runs the model knows: device, backends, runner, graphs.

    Parameters
    ----------
    worker : of vLLM, or its wrapper.
    """
    import torch

    runner = getattr(worker, "worker", worker).model_runner
    config = runner.vllm_config
    cuda = config.device_config.device_type == "cuda"
    layers = [layer for layer in config.compilation_config.static_forward_context.values() if hasattr(layer, "attn_backend")]
    backends = {f"{layer.attn_backend.__module__}.{layer.attn_backend.__qualname__}" for layer in layers}
    flash: set[Any] = {getattr(getattr(layer, "impl", None), "vllm_flash_attn_version", None) for layer in layers} - {None}
    return {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "compute_capability": list(torch.cuda.get_device_capability()) if cuda else None,
        "driver": _driver() if cuda else None,
        "backends": sorted(backends),
        "backend_names": sorted({layer.attn_backend.get_name() for layer in layers}),
        "flash_attention": max(flash, default=None),
        "runner": type(runner).__module__,
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
    }


def worker_memory(worker: Any) -> dict[str, int]:
    """Return the most bytes that PyTorch reserved on a worker's GPU (`peak_bytes`), and those in use there (`device_bytes`)."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return {"peak_bytes": torch.cuda.max_memory_reserved(), "device_bytes": total - free}


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip()
