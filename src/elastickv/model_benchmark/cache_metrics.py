"""What a model's benchmark says of one cache: its speed with an interval, its bytes, and the floor that the memory sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from statistics import median
from typing import Any

import torch

from elastickv.benchmark.stats.intervals import ratio_interval
from elastickv.model_benchmark.generation import Generation
from elastickv.transformers.layer_storage import backend_for

SKIPPED = 1  # the piece with the prompt


def machine(device: torch.device) -> dict[str, Any]:
    """Return what a device is, and the limits of its memory, measured now (about a second), as JSON values.

    Raises
    ------
    UsageError : if no back end works there.
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


def read_weights_bytes(model: Any) -> int:
    """Return the bytes of the weights that a step reads: all, but of an embedding that is not the output matrix too."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = output is None or output.weight is embedding.weight
    return sum(int(weight.nbytes) for weight in model.parameters()) - (0 if tied else int(embedding.weight.nbytes))


def cache_figures(generation: Generation, weights_bytes: int, read_ceiling_gbs: float) -> dict[str, Any]:
    """Return a generation's receipt, with the speed of the counted samples and the samples.

    Parameters
    ----------
    weights_bytes : that a step reads.
    read_ceiling_gbs : 10^9 bytes per second that the device reads at most.
    """
    receipt = generation.receipt()
    counted = [list(piece.step_s) for piece in generation.pieces[SKIPPED:]]
    steps = [step for sample in counted for step in sample]
    means = [1e3 * sum(sample) / len(sample) for sample in counted]
    read = receipt["kv_read_bytes"] / (receipt["new_tokens"] - 1)  # the first token decodes nothing
    floor_ms = (weights_bytes + read) / read_ceiling_gbs / 1e6
    mean_ms = 1e3 * sum(steps) / len(steps)
    return receipt | {
        "tokens_per_s": 1e3 * receipt["rows"] / mean_ms,
        "step_ms": asdict(ratio_interval(means, [1.0] * len(means))),
        "median_step_ms": 1e3 * median(steps),
        "kv_read_bytes_per_step": read,
        "floor_ms": floor_ms,
        "of_floor": mean_ms / floor_ms,
        "held_ratio": _held_ratio(receipt),
        "step_s": counted,
    }


def _held_ratio(receipt: Mapping[str, Any]) -> float | None:
    """Return the bytes of the same tokens dense in 16 bit / those that are held as measured."""
    held = receipt["held_bytes"]
    return receipt["kv_dense_bytes"] / held if held else None
