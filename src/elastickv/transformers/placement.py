"""Where a model's layers and heads are: devices that Accelerate spreads layers over, and ranks of tensor parallelism."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from elastickv.recipe import Recipe
from elastickv.recipe.calibration import StorageStatistics

_OFFLOADED = ("cpu", "disk")


@dataclass(frozen=True)
class Ranks:
    """A process among those that a model is split over.

    Attributes
    ----------
    number : of this rank, in the order of their KV heads.
    count : number of ranks.
    group : their process group; None for a single rank.
    device : of this rank's weights.
    """

    number: int = 0
    count: int = 1
    group: Any = None
    device: torch.device | None = None

    def __str__(self) -> str:
        return f" of rank {self.number} of {self.count}" if self.count > 1 else ""

    def share(self, recipe: Recipe, kv_heads: int, local: int) -> Recipe:
        """Return a recipe for this rank's `local` heads of the model's `kv_heads`."""
        if len(recipe.fractions) != kv_heads or local == kv_heads:
            return recipe
        first = self.number * local
        return replace(recipe, fractions=recipe.fractions[first : first + local])

    def share_heads(self, statistics: StorageStatistics, local: int) -> StorageStatistics:
        """Return the statistics of this rank's `local` KV heads."""
        return statistics.of_heads(self.number * local, local)

    def uneven(self, recipe: Recipe) -> tuple[bool, ...]:
        """Return for each rank whether its heads have unequal shares of pages, which needs another kernel. () for one rank."""
        local = len(recipe.fractions) // self.count
        firsts = range(0, local * self.count, local) if local and self.count > 1 else ()
        return tuple(len(set(recipe.fractions[head : head + local])) > 1 for head in firsts)

    def agree(self, yes: bool) -> bool:
        """Return whether all ranks pass True. Every rank must call this, and waits for the others."""
        if self.count == 1:
            return yes
        vote = torch.tensor(int(yes), device=self.device)
        torch.distributed.all_reduce(vote, torch.distributed.ReduceOp.MIN, group=self.group)
        return bool(vote)


def ranks_of(model: Any) -> Ranks:
    """Return this process among the ranks of a model; the only one if the weights are not split."""
    for parameter in model.parameters():
        mesh = getattr(parameter, "device_mesh", None)
        # Meshes of one dimension may have no name. Weights split in other ways (FSDP) are gathered for a pass.
        if mesh is not None and "tp" in (mesh.mesh_dim_names or ("tp",)):
            mesh = mesh["tp"] if mesh.ndim > 1 else mesh
            return Ranks(mesh.get_local_rank(), mesh.size(), mesh.get_group(), parameter.device)
    return Ranks()


def layer_devices(layers: Sequence[int], device_map: Mapping[str, Any] | None) -> dict[int, str | None]:
    """Return the device on which each of `layers` computes; None where the map does not say.

    Parameters
    ----------
    device_map : the model's `hf_device_map`, from module names to devices; None for a model on one device. Offloaded modules
        compute on the first GPU.
    """
    devices = {name: _device_name(device) for name, device in (device_map or {}).items()}
    first_gpu = next((device for device in devices.values() if device not in _OFFLOADED), "cpu")
    by_layer: dict[int, str] = {}
    for name, device in devices.items():
        number = next(filter(str.isdecimal, name.split(".")), None)
        if number is not None:
            by_layer.setdefault(int(number), first_gpu if device in _OFFLOADED else device)
    whole = devices.get("")
    return {layer: by_layer.get(layer, first_gpu if whole in _OFFLOADED else whole) for layer in layers}


def layers_on_same_device(layer: int, layers: Sequence[int], device_map: Mapping[str, Any] | None) -> list[int]:
    """Return those of `layers` that compute on the device of `layer`, including `layer`; `device_map` as in `layer_devices`."""
    devices = layer_devices(layers, device_map)
    return [other for other in layers if devices[other] == devices[layer]]


def _device_name(device: Any) -> str:
    if isinstance(device, int):
        return f"cuda:{device}"
    return "cuda:0" if str(device) == "cuda" else str(device)
