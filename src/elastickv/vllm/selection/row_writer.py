"""Writes what kernels read of a step's requests where a captured graph finds it, without waiting for the device."""

from collections.abc import Mapping
from typing import Any

import torch

from elastickv.vllm.selection.device_selection import NEVER, DeviceSelection, SelectionRows
from elastickv.vllm.selection.request_ratios import newest_blocks


class RowWriter:
    """The rows of a step, for a builder of metadata.

    Parameters
    ----------
    selection : of the builder's layers.
    requests : the most of a step, those included that pad a captured graph.
    """

    def __init__(self, selection: DeviceSelection, requests: int, device: torch.device) -> None:
        self._selection, self._device = selection, device
        self.rows = SelectionRows.of(requests, device)
        self._numbers_of_blocks = torch.zeros(0, dtype=torch.int32, device=device)
        self._has_ratios = False

    def write(self, batch: Any, ratios: Mapping[int, float]) -> SelectionRows:
        """Return the rows of a step.

        Parameters
        ----------
        batch : vLLM's `CommonAttentionMetadata`.
        ratios : block of a request's newest page -> the request's own ratio.
        """
        rows, padded = self.rows, batch.num_reqs
        if batch.req_idx is None or batch.rswa_prefix_lens is None:  # a graph is captured, or memory is measured
            rows.prompts[:padded] = NEVER
            return rows
        requests = len(batch.rswa_prefix_lens)
        indices = torch.from_numpy(batch.req_idx[:requests])
        rows.request_indices[:requests].copy_(self._sent(indices))
        rows.prompts[:requests].copy_(batch.rswa_prefix_lens)
        rows.prompts[requests:padded] = NEVER
        self._write_ratios(batch, ratios)
        if batch.is_prefilling is not None and bool((starting := batch.is_prefilling[:requests]).any()):
            self._selection.forget(self._sent(indices[starting].long()))
        return rows

    def _write_ratios(self, batch: Any, ratios: Mapping[int, float]) -> None:
        """Find requests by their newest page's block, whose number the device alone knows."""
        if not ratios and not self._has_ratios:
            return
        self._has_ratios, numbers = bool(ratios), self.rows.ratio_numbers[: batch.num_reqs]
        if not ratios:
            self.rows.ratio_numbers.zero_()
            return
        if max(ratios) >= len(self._numbers_of_blocks):
            self._numbers_of_blocks = torch.zeros(2 * max(ratios) + 1, dtype=torch.int32, device=self._device)
        of_block = {block: self._selection.number_of(ratio, ratios) for block, ratio in ratios.items()}
        blocks, own = (self._sent(torch.tensor(list(each))) for each in (of_block.keys(), of_block.values()))
        self._numbers_of_blocks.zero_()
        self._numbers_of_blocks[blocks] = own.int()
        newest = newest_blocks(batch).long()
        known = newest < len(self._numbers_of_blocks)
        numbers.copy_(torch.where(known, self._numbers_of_blocks[torch.where(known, newest, 0)], 0))

    def _sent(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return numbers on the device: the copy is queued, and page-locked memory is kept until it is done."""
        return numbers.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else numbers
