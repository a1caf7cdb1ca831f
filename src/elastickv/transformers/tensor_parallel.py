"""The ranks that a model is split over (`tp_plan`): each has its own KV heads, and takes every step as the others do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from elastickv.recipe import Recipe


@dataclass(frozen=True)
class Ranks:
    """A process among those that a model is split over.

    Attributes
    ----------
    number : of this rank, in the order in which KV heads are dealt out.
    count : of ranks.
    group : through which they talk; None where there is one.
    device : of this rank's weights.
    """

    number: int = 0
    count: int = 1
    group: Any = None
    device: torch.device | None = None

    def __str__(self) -> str:
        return f" of rank {self.number} of {self.count}" if self.count > 1 else ""

    def share(self, recipe: Recipe, kv_heads: int, local: int) -> Recipe:
        """Return a recipe for `local` of the model's `kv_heads`: the ones that this rank has."""
        if len(recipe.fractions) != kv_heads or local == kv_heads:
            return recipe
        first = self.number * local
        return replace(recipe, fractions=recipe.fractions[first : first + local])

    def uneven(self, recipe: Recipe) -> tuple[bool, ...]:
        """Return of each rank whether its heads have different shares of the pages, and so run another kernel; () if alone."""
        local = len(recipe.fractions) // self.count
        firsts = range(0, local * self.count, local) if local and self.count > 1 else ()
        return tuple(len(set(recipe.fractions[head : head + local])) > 1 for head in firsts)

    def agree(self, yes: bool) -> bool:
        """Return whether all ranks say yes. Each of them has to ask, and waits for the others."""
        if self.count == 1:
            return yes
        said = torch.tensor(int(yes), device=self.device)
        torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MIN, group=self.group)
        return bool(said)


def ranks_of(model: Any) -> Ranks:
    """Return this process among the ranks of a model; where its weights lie whole, it is the only one."""
    for parameter in model.parameters():
        mesh = getattr(parameter, "device_mesh", None)
        # Meshes of one dimension may be nameless; weights that are split otherwise (FSDP) are whole again in a pass.
        if mesh is not None and "tp" in (mesh.mesh_dim_names or ("tp",)):
            mesh = mesh["tp"] if mesh.ndim > 1 else mesh
            return Ranks(mesh.get_local_rank(), mesh.size(), mesh.get_group(), parameter.device)
    return Ranks()
