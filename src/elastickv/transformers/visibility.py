"""What a mask says: which new places are tokens, and which of them a query sees."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from elastickv.errors import UsageError
from elastickv.transformers.slots import Slots


def real_tokens(mask: torch.Tensor | None, new: int, batch: int, slots: Slots) -> NDArray[np.bool_] | None:
    """Return (batch, new), which of the last places hold tokens: those that the last query sees. None: all of them.

    Raises
    ------
    UsageError : if the mask hides from the last query what another one sees, or hides tokens that are stored: keys are stored
        for every later query, or not at all.
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
    earlier = seen[:, 0, -1, :-new]
    if earlier.shape[1]:
        held = torch.as_tensor(slots.real(batch), device=earlier.device)
        if earlier.shape[1] != held.shape[1] or not bool((earlier == held).all()):
            raise UsageError("the mask hides tokens that the cache holds, or shows what was padding: give a causal mask")
    if bool(last.all()):
        return None
    return np.asarray(last.expand(batch, -1).cpu().numpy(), np.bool_)


def visible_new(mask: torch.Tensor | None, new: int) -> torch.Tensor | None:
    """Return (batch or 1, 1, new, new) bool: which new tokens a new query sees; None: those up to its own."""
    return None if mask is None else _seen(mask)[..., -new:]


def _seen(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
