"""What a mask says: which new places are tokens, and which of them a query sees."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from elastickv.errors import UsageError
from elastickv.transformers.padding import Padding

_OTHERWISE = "the mask hides tokens that the cache holds, or shows what was padding: give a causal mask, or one that goes on"


class MaskedPositions(int):
    """How many places a layer counts so far: where the columns of a mask of new tokens begin. Knows which hold tokens."""

    slots: Padding

    @classmethod
    def of(cls, slots: Padding) -> MaskedPositions:
        """Return the number of places, which leads to them."""
        places = cls(slots.length)
        places.slots = slots
        return places


def check_mask_is_given(mask: torch.Tensor, first: MaskedPositions, new: int) -> None:
    """Refuse a mask of two dimensions that says otherwise of the places so far than the masks before did.

    Raises
    ------
    UsageError : if it does, or ends before the new tokens do: keys are stored for every later query, or not at all.
    """
    if mask.shape[1] < first + new:
        raise UsageError(
            f"the attention_mask has {mask.shape[1]} columns, and the cache holds {int(first)} places and gets {new}: give a "
            "mask of them all, padding included"
        )
    if not bool(first.slots.agrees(mask)):
        raise UsageError(_OTHERWISE)


def real_tokens(mask: torch.Tensor | None, new: int, batch: int, slots: Padding) -> NDArray[np.bool_] | None:
    """Return (batch, new), which of the last places hold tokens: those that the last query sees. None: all of them.

    Raises
    ------
    UsageError : if the mask hides from the last query what another one sees, or from any query tokens that are stored, or moves
        scores instead of hiding keys: keys are stored for every later query, or not at all.
    """
    if mask is None:
        return None
    seen = _seen(mask)
    if seen.shape[1] != 1:
        raise UsageError(f"a mask for each of {seen.shape[1]} heads is not supported: give one for all")
    own = seen[:, 0, :, -new:]
    last = own[:, -1]
    if bool((own.any(dim=1) & ~last).any()):
        raise UsageError("the mask hides from the last token what another one sees: give a causal mask, or a 2D one")
    earlier = seen[:, 0, :, :-new]
    if earlier.shape[2]:
        held = torch.as_tensor(slots.real(batch), device=earlier.device)
        # What padding sees among them matters to nobody.
        if earlier.shape[2] != held.shape[1] or bool(((earlier != held[:, None]) & last[:, :, None]).any()):
            raise UsageError(_OTHERWISE)
    if bool(last.all()):
        return None
    return np.asarray(last.expand(batch, -1).cpu().numpy(), np.bool_)


def visible_new(mask: torch.Tensor | None, new: int) -> torch.Tensor | None:
    """Return (batch or 1, 1, new, new) bool: which new tokens a new query sees; None: those up to its own."""
    return None if mask is None else _seen(mask)[..., -new:]


def _seen(mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return mask
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if not bool((hidden | (mask == 0)).all()):
        raise UsageError("the mask adds numbers to scores: give True and False, or 0 and the lowest number of its dtype")
    return ~hidden
