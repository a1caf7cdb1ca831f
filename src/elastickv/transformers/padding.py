"""Which positions of a batch hold tokens and which are padding, and what attention masks say about them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from elastickv.errors import UsageError

Bools = NDArray[np.bool_]
_CONTRADICTION = (
    "the mask hides tokens that the cache holds, or shows what was padding: give a causal mask, or one that continues the "
    "earlier mask"
)


class Padding:
    """The positions that the model counts: everything a layer has received, row by row, padding included.

    A run without padding is stored as its length alone.

    Attributes
    ----------
    length : positions so far, the same for every row.
    """

    def __init__(self) -> None:
        self.length = 0
        self._runs: list[tuple[int, Bools | None]] = []
        self._device_mask: torch.Tensor | None = None

    def add(self, count: int, real: Bools | None) -> None:
        """Append `count` positions; `real`, (batch, count), is True for tokens. None: there is no padding among them."""
        self.length += count
        if real is not None:
            self._device_mask = None
        if real is None and self._runs and self._runs[-1][1] is None:
            self._runs[-1] = (self._runs[-1][0] + count, None)
        elif count:
            self._runs.append((count, None if real is None else np.array(real, np.bool_)))

    def remove(self, count: int, batch: int) -> NDArray[np.int64]:
        """Remove the last `count` positions; return how many tokens each row loses."""
        lost, self._device_mask = np.zeros(batch, np.int64), None
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
        """Replace the rows by copies of `rows`."""
        self._runs = [(size, None if real is None else real[rows]) for size, real in self._runs]
        self._device_mask = None

    def real(self, batch: int) -> Bools:
        """Return (batch, length): True where a position holds a token."""
        parts = [np.ones((batch, size), np.bool_) if real is None else real for size, real in self._runs]
        return np.concatenate(parts, axis=1) if parts else np.zeros((batch, 0), np.bool_)

    def agrees(self, mask: torch.Tensor) -> torch.Tensor:
        """Return whether a (batch, length or more) mask marks the same tokens and padding: () bool, on the mask's device.

        Every decode calls this, so a copy stays on the device. It ends at the last run with padding: all later positions are
        tokens.
        """
        if self._device_mask is None or self._device_mask.device != mask.device:
            tokens = self._runs[-1][0] if self._runs and self._runs[-1][1] is None else 0
            batch = next((len(real) for _, real in self._runs if real is not None), len(mask))
            self._device_mask = torch.as_tensor(self.real(batch)[:, : self.length - tokens], device=mask.device)
        end, shown = self._device_mask.shape[1], mask[:, : self.length] != 0
        if end and len(self._device_mask) != len(mask):
            return shown.new_ones(())  # another batch size: `check_tokens` refuses its keys
        return (shown[:, :end] == self._device_mask).all() & shown[:, end:].all()

    def copy(self) -> Padding:
        """Return an equal object that shares no mutable state with this one."""
        other = Padding()
        other.length, other._runs = self.length, list(self._runs)
        return other


class MaskedPositions(int):
    """How many positions a layer counts so far, which is where a mask of new tokens begins; refers to the layer's padding."""

    padding: Padding

    @classmethod
    def of(cls, padding: Padding) -> MaskedPositions:
        """Return the number of positions with a reference to `padding`."""
        first = cls(padding.length)
        first.padding = padding
        return first


def check_mask_agrees(mask: torch.Tensor, first: MaskedPositions, new: int) -> None:
    """Check a two-dimensional mask against the padding of the positions so far.

    Raises
    ------
    UsageError : if the mask contradicts earlier masks or ends before the new tokens do: keys are stored for all later queries,
        or not at all.
    """
    if mask.shape[1] < first + new:
        raise UsageError(
            f"the attention_mask has {mask.shape[1]} columns, and the cache holds {int(first)} positions and gets {new}: give "
            "a mask of them all, padding included"
        )
    if not bool(first.padding.agrees(mask)):
        raise UsageError(_CONTRADICTION)


def real_tokens(mask: torch.Tensor | None, new: int, batch: int, padding: Padding) -> Bools | None:
    """Return (batch, new): True where a new position holds a token, which is where the last query sees it. None: everywhere.

    Raises
    ------
    UsageError : if the mask hides a new token from the last query but not from an earlier one, hides stored tokens from any
        query, or adds numbers to scores instead of hiding keys: keys are stored for all later queries, or not at all.
    """
    if mask is None:
        return None
    visible = _as_bool(mask)
    if visible.shape[1] != 1:
        raise UsageError(f"a mask for each of {visible.shape[1]} heads is not supported: give one for all")
    new_visible = visible[:, 0, :, -new:]
    last = new_visible[:, -1]
    if bool((new_visible.any(dim=1) & ~last).any()):
        raise UsageError("the mask hides from the last token what an earlier one sees: give a causal mask, or a 2D one")
    earlier = visible[:, 0, :, :-new]
    if earlier.shape[2]:
        held = torch.as_tensor(padding.real(batch), device=earlier.device)
        # What a padding query sees does not matter.
        if earlier.shape[2] != held.shape[1] or bool(((earlier != held[:, None]) & last[:, :, None]).any()):
            raise UsageError(_CONTRADICTION)
    if bool(last.all()):
        return None
    return np.asarray(last.expand(batch, -1).cpu().numpy(), np.bool_)


def visible_new(mask: torch.Tensor | None, new: int) -> torch.Tensor | None:
    """Return (batch or 1, 1, new, new) bool: which new tokens a new query sees. None: those up to its own position."""
    return None if mask is None else _as_bool(mask)[..., -new:]


def without_padding(
    keys: torch.Tensor, values: torch.Tensor, real: Bools | None
) -> tuple[torch.Tensor, torch.Tensor, NDArray[np.int64]]:
    """Return keys and values with every row's tokens first, and how many there are."""
    batch, heads, tokens, dim = keys.shape
    if real is None:
        return keys, values, np.full(batch, tokens, np.int64)
    lengths = real.sum(axis=1).astype(np.int64)
    order = np.argsort(~real, axis=1, kind="stable")[:, : max(1, int(lengths.max()))]
    index = torch.as_tensor(order, device=keys.device)[:, None, :, None].expand(-1, heads, -1, dim)
    return keys.gather(2, index), values.gather(2, index), lengths


def _as_bool(mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return mask
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if not bool((hidden | (mask == 0)).all()):
        raise UsageError("the mask adds numbers to scores: give True and False, or 0 and the lowest number of its dtype")
    return ~hidden
