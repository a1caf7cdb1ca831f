"""Which pages a request's own tokens read on a GPU: lists that some of them choose, in device memory.

The rule is `decode_selection`'s, applied by kernels (`kernels/select_blocks.cu`), so that a captured graph selects anew in
every step. A request has its lists at its row of the model runner's table of requests, which it keeps while it runs, wherever
it is in the batch. What is computed from a prompt, or anew after a preemption, reads every page, and forgets the lists there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from elastickv.backends.cuda.block_arguments import PageListArguments
from elastickv.errors import UsageError
from elastickv.recipe import PAGE_TOKENS, Recipe
from elastickv.vllm.selection.ratio_shares import Shares

NEVER = 2**31 - 1  # tokens of the prompt of a row of no request: no token comes after it
_MOST_PAGES = 1 << 16  # that numbers of 16 bits can name


@dataclass(frozen=True)
class SelectionRows:
    """What kernels read of a step's requests, (requests,) int32 each, at addresses that do not change.

    Attributes
    ----------
    request_indices : each one's row in the model runner's table.
    prompts : tokens of each one's prompt; `NEVER` for rows of no request.
    ratio_numbers : of each one's ratio: `DeviceSelection.number_of`.
    """

    request_indices: torch.Tensor
    prompts: torch.Tensor
    ratio_numbers: torch.Tensor

    @classmethod
    def of(cls, requests: int, device: torch.device) -> "SelectionRows":
        """Return rows for up to `requests` requests, none of which has a list."""
        indices, prompts, numbers = (torch.zeros(requests, dtype=torch.int32, device=device) for _ in range(3))
        return cls(indices, prompts.fill_(NEVER), numbers)


class _ListMemory:
    """Lists of the layers with so many KV heads.

    Attributes
    ----------
    headers : (layers, requests, ring, kv_heads, 4) int32, as in `PageListArguments`.
    lists : (layers, requests, ring, kv_heads, capacity) uint16 numbers of pages.
    fractions : (layers, ratios, kv_heads) float64.
    """

    def __init__(self, layers: int, requests: int, ring: int, kv_heads: int, capacity: int, device: str) -> None:
        shape = layers, requests, ring, kv_heads
        self.headers = torch.full((*shape, 4), -1, dtype=torch.int32, device=device)
        self.lists = torch.zeros((*shape, capacity), dtype=torch.uint16, device=device)
        self.fractions = torch.ones(layers, requests + 1, kv_heads, dtype=torch.float64, device=device)


class DeviceSelection:
    """Selection of pages in the layers of one rank.

    Parameters
    ----------
    shares_of_layer : returns the shares of the pages of a layer's KV heads, all of them, for a request's own ratio; None is the
        server's.
    requests : most requests that run at a time.
    drafts : most draft tokens of a request in a step.
    capacity : most pages of a request.
    device : of the lists.

    Raises
    ------
    UsageError : if a list cannot name so many pages.
    """

    def __init__(
        self,
        shares_of_layer: Callable[[int, float | None], Shares],
        requests: int,
        drafts: int,
        capacity: int,
        device: str = "cuda",
    ) -> None:
        if capacity > _MOST_PAGES:
            most = _MOST_PAGES * PAGE_TOKENS
            raise UsageError(
                f"decodes of up to {capacity * PAGE_TOKENS:,} tokens cannot select pages: give a `max_model_len` of at most "
                f"{most:,}, or leave out `compress`"
            )
        self._shares_of_layer, self._requests, self._drafts = shares_of_layer, requests, drafts
        self.capacity, self._device = capacity, device
        self._layers: dict[int, DeviceLayerSelection] = {}
        self._memory: dict[tuple[int, int], _ListMemory] = {}
        self._numbers: dict[float, int] = {}

    def add_layer(self, number: int, recipe: Recipe, kv_heads: range, offset: int) -> "DeviceLayerSelection":
        """Return the selection of a layer of this rank.

        Parameters
        ----------
        kv_heads : numbers of the rank's KV heads.
        offset : by how many steps the layer's anchors come early.
        """
        # The anchors that the first token of a step reads, and those of its drafts.
        ring = 1 + -(-self._drafts // recipe.anchor_every)
        index = sum(each.memory_key == (len(kv_heads), ring) for each in self._layers.values())
        self._layers[number] = DeviceLayerSelection(self, index, (len(kv_heads), ring), kv_heads, recipe.anchor_every, offset)
        return self._layers[number]

    def reserve(self) -> None:
        """Allocate the lists of all layers, once, while vLLM measures how much memory is left for its caches."""
        if self._memory:
            return
        keys = [each.memory_key for each in self._layers.values()]
        for kv_heads, ring in dict.fromkeys(keys):
            layers = keys.count((kv_heads, ring))
            self._memory[kv_heads, ring] = _ListMemory(layers, self._requests, ring, kv_heads, self.capacity, self._device)
        self._write_fractions(0, None)

    def memory_of(self, key: tuple[int, int]) -> _ListMemory:
        """Return the lists of layers with so many KV heads and anchors."""
        return self._memory[key]

    def number_of(self, ratio: float, in_step: Mapping[int, float]) -> int:
        """Return the number of a request's own ratio, by which kernels find its fractions; the server's is 0.

        Parameters
        ----------
        in_step : block -> ratio, of the step: the numbers of other ratios are reused once all are taken.
        """
        if ratio not in self._numbers:
            if len(self._numbers) == self._requests:
                self._numbers = {each: n for each, n in self._numbers.items() if each in in_step.values()}
            free = next(n for n in range(1, self._requests + 1) if n not in self._numbers.values())
            self._numbers[ratio] = free
            self._write_fractions(free, ratio)
        return self._numbers[ratio]

    def forget(self, request_indices: torch.Tensor) -> None:
        """Forget the lists of requests, by (requests,) int64 rows of the runner's table on the device."""
        for memory in self._memory.values():
            memory.headers.index_fill_(1, request_indices, -1)

    def _write_fractions(self, number: int, ratio: float | None) -> None:
        for key, memory in self._memory.items():
            layers = [layer for layer, each in self._layers.items() if each.memory_key == key]  # in the order of their indices
            shares = [np.take(self._shares_of_layer(layer, ratio), self._layers[layer].kv_heads) for layer in layers]
            memory.fractions[:, number] = torch.from_numpy(np.stack(shares)).to(self._device)


@dataclass(frozen=True)
class DeviceLayerSelection:
    """Selection of pages in one layer.

    Attributes
    ----------
    selection : of all layers.
    index : the layer's number among those of the same `memory_key`.
    memory_key : KV heads and ring of its lists.
    kv_heads : numbers of this rank's KV heads.
    anchor_every, anchor_offset : as in `Recipe.steps_since_refresh`.
    """

    selection: DeviceSelection
    index: int
    memory_key: tuple[int, int]
    kv_heads: range
    anchor_every: int
    anchor_offset: int

    def reserve(self) -> None:
        """Allocate the lists of all layers."""
        self.selection.reserve()

    def arguments(self, rows: SelectionRows) -> PageListArguments:
        """Return what kernels take for a step."""
        memory = self.selection.memory_of(self.memory_key)
        return PageListArguments(
            request_indices=rows.request_indices.data_ptr(),
            prompts=rows.prompts.data_ptr(),
            ratio_numbers=rows.ratio_numbers.data_ptr(),
            fractions=memory.fractions[self.index].data_ptr(),
            headers=memory.headers[self.index].data_ptr(),
            page_lists=memory.lists[self.index].data_ptr(),
            anchor_every=self.anchor_every,
            anchor_offset=self.anchor_offset,
            ring=self.memory_key[1],
            list_capacity=self.selection.capacity,
        )
