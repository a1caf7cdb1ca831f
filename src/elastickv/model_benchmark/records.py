"""What results record: the environment, the device, the model, and each cache's speed, bytes and memory-bandwidth floor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch

from elastickv.benchmark.environment import environment
from elastickv.model_benchmark.generation import Generation
from elastickv.model_benchmark.speedups import mean_interval
from elastickv.transformers.layer_storage import backend_for
from elastickv.transformers.model_loading import Loaded
from elastickv.transformers.model_support import sizes_of

SKIPPED = 1  # the piece with the prompt


def environment_record() -> dict[str, Any]:
    """Return versions, operating system and processor, with what Transformers adds, as JSON values."""
    record = environment()
    try:
        transformers = version("transformers")
    except PackageNotFoundError:
        transformers = None
    record["versions"] |= {"transformers": transformers}
    return record | {"torch_threads": torch.get_num_threads()}


def device_record(device: torch.device) -> dict[str, Any]:
    """Return a device's properties and its memory bandwidth, measured now (about a second), as JSON values.

    Raises
    ------
    UsageError : if no backend supports the device.
    """
    backend = backend_for(device)
    info, ceilings = backend.device, backend.ceilings()
    return {
        "backend": backend.name,
        "name": info.name,
        "driver": info.driver,
        "torch_cuda": torch.version.cuda if device.type == "cuda" else None,
        "memory_bytes": info.memory_bytes,
        "theoretical_gbs": info.theoretical_bw_gbs,
        "read_ceiling_gbs": ceilings.read_gbs,
        "copy_ceiling_gbs": ceilings.copy_gbs,
    }


def model_record(loaded: Loaded) -> dict[str, Any]:
    """Return a model's sizes and where it runs, as JSON values."""
    model, sizes = loaded.model, sizes_of(loaded.model)
    return {
        "name": loaded.name,
        "type": sizes.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "device_name": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else None,
        "weights_bytes": sum(weight.nbytes for weight in model.parameters()),
        "read_weights_bytes": _read_weights_bytes(model),
        "elastic_layers": len(sizes.elastic),
        "query_heads": sizes.query_heads,
        "kv_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
    }


def _read_weights_bytes(model: Any) -> int:
    """Return the bytes of the weights that a step reads: all, except an embedding that is not also the output matrix."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = output is None or output.weight is embedding.weight
    return sum(int(weight.nbytes) for weight in model.parameters()) - (0 if tied else int(embedding.weight.nbytes))


def cache_record(generation: Generation, weights_bytes: int, read_ceiling_gbs: float) -> dict[str, Any]:
    """Return a generation's metrics, with the speed of the timed samples and the samples themselves.

    Parameters
    ----------
    weights_bytes : of the weights that a step reads.
    read_ceiling_gbs : read bandwidth of the device, 10^9 bytes per second.
    """
    metrics = generation.metrics()
    samples = [list(piece.step_s) for piece in generation.pieces[SKIPPED:]]
    steps = [step for sample in samples for step in sample]
    means = [1e3 * sum(sample) / len(sample) for sample in samples]
    read = metrics["kv_read_bytes"] / (metrics["new_tokens"] - 1)  # the first token decodes nothing
    floor_ms = (weights_bytes + read) / read_ceiling_gbs / 1e6
    mean_ms = 1e3 * sum(steps) / len(steps)
    step_ms = mean_interval(means)
    return metrics | {
        "tokens_per_s": 1e3 * metrics["rows"] / mean_ms,
        "step_ms": None if step_ms is None else asdict(step_ms),
        "median_step_ms": 1e3 * median(steps),
        "kv_read_bytes_per_step": read,
        "floor_ms": floor_ms,
        "of_floor": mean_ms / floor_ms,
        "held_ratio": _held_ratio(metrics),
        "model_held_ratio": _model_held_ratio(metrics),
        "step_s": samples,
    }


def _held_ratio(metrics: Mapping[str, Any]) -> float | None:
    """Return what the layers with full attention would hold in 16 bit / the bytes that are measured, without other layers'."""
    held = (metrics["held_bytes"] or 0) - metrics["kv_other_bytes"]
    return metrics["kv_dense_bytes"] / held if held > 0 else None


def _model_held_ratio(metrics: Mapping[str, Any]) -> float | None:
    """Return what all layers would hold in 16 bit / the bytes that are measured. None if all layers have full attention."""
    held, others = metrics["held_bytes"], metrics["kv_other_dense_bytes"]
    return (metrics["kv_dense_bytes"] + others) / held if held and others else None
