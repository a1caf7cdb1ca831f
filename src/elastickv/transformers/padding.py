"""Which places of a batch hold tokens, and which are padding."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

Bools = NDArray[np.bool_]


class Padding:
    """The places that a model counts: all that it was ever given, row by row, padding included.

    Runs without padding are kept as a number alone.

    Attributes
    ----------
    length : places so far, the same for every row.
    """

    def __init__(self) -> None:
        self.length = 0
        self._runs: list[tuple[int, Bools | None]] = []
        self._told: torch.Tensor | None = None

    def add(self, count: int, real: Bools | None) -> None:
        """Count `count` more places; `real`, (batch, count), tells tokens from padding, None that there is no padding."""
        self.length += count
        if real is not None:
            self._told = None
        if real is None and self._runs and self._runs[-1][1] is None:
            self._runs[-1] = (self._runs[-1][0] + count, None)
        elif count:
            self._runs.append((count, None if real is None else np.array(real, np.bool_)))

    def remove(self, count: int, batch: int) -> NDArray[np.int64]:
        """Forget the last `count` places; return how many tokens each row loses."""
        lost, self._told = np.zeros(batch, np.int64), None
        while count:
            size, real = self._runs.pop()
            taken = min(size, count)
            lost += taken if real is None else real[:, size - taken :].sum(axis=1)
            if taken < size:
                self._runs.append((size - taken, None if real is None else real[:, : size - taken]))
            count -= taken
            self.length -= taken
        return lost

    def gather(self, rows: NDArray[np.int64]) -> None:
        """Take copies of `rows` for rows."""
        self._runs = [(size, None if real is None else real[rows]) for size, real in self._runs]
        self._told = None

    def real(self, batch: int) -> Bools:
        """Return (batch, length): whether a place holds a token."""
        parts = [np.ones((batch, size), np.bool_) if real is None else real for size, real in self._runs]
        return np.concatenate(parts, axis=1) if parts else np.zeros((batch, 0), np.bool_)

    def agrees(self, mask: torch.Tensor) -> torch.Tensor:
        """Return whether a (batch, length or more) mask says what was said of the places so far: () bool, on its device.

        A decode asks at every step: what is kept on the device ends at the last run with padding, behind which all are tokens.
        """
        if self._told is None or self._told.device != mask.device:
            tokens = self._runs[-1][0] if self._runs and self._runs[-1][1] is None else 0
            batch = next((len(real) for _, real in self._runs if real is not None), len(mask))
            self._told = torch.as_tensor(self.real(batch)[:, : self.length - tokens], device=mask.device)
        end, said = self._told.shape[1], mask[:, : self.length] != 0
        if end and len(self._told) != len(mask):
            return said.new_ones(())  # another batch: told as such when its keys come
        return (said[:, :end] == self._told).all() & said[:, end:].all()

    def copy(self) -> Padding:
        """Return an equal object that shares nothing that changes."""
        other = Padding()
        other.length, other._runs = self.length, list(self._runs)
        return other
