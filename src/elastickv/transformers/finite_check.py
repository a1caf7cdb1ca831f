"""A NaN or an infinity in tensors, as an error that names its place."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from elastickv.errors import NonFiniteError


def check_finite(
    named: str, head_named: str, tensors: tuple[torch.Tensor, ...], real: NDArray[np.bool_] | None, held: NDArray[np.int64]
) -> None:
    """Look for what is not finite in tokens, padding left out.

    Parameters
    ----------
    named, head_named : what the tensors hold, and whose heads they are, for the message.
    tensors : (batch, heads, places, head_dim).
    real : (batch, places), which places hold tokens; None: all.
    held : (batch,) tokens before the first place.

    Raises
    ------
    NonFiniteError : naming sequence, head and position of the first that is not finite.
    """
    finite = torch.stack([torch.isfinite(tensor).all(dim=-1) for tensor in tensors]).all(dim=0)
    if bool(finite.all()):
        return
    bad = ~finite.cpu().numpy()
    tokens = np.ones((bad.shape[0], bad.shape[2]), np.bool_) if real is None else real
    for row, head, place in np.argwhere(bad & tokens[:, None]):
        position = held[row] + tokens[row, :place].sum()
        raise NonFiniteError(f"{named} that is not finite: sequence {row}, {head_named} {head}, position {position}")
