"""The ranks that a model is split over (`tp_plan`). Each has its own KV heads, and all take the same steps."""

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
