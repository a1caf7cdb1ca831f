"""What a layer's kernels do in a step: the interface that CUDA and the CPU share, and the rotation around it."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from elastickv.kvcache.hadamard import rotated, rotated_block
from elastickv.recipe import Recipe
from elastickv.recipe.calibration import Smoothing
from elastickv.transformers.key_smoothing import KeySmoothing
from elastickv.vllm.bad_tokens import BadTokens
from elastickv.vllm.step_metadata import PageMetadata, WindowMetadata

if TYPE_CHECKING:  # it loads the kernels of CPUs
    from elastickv.vllm.selection.decode_selection import DecodeSelection
    from elastickv.vllm.selection.device_selection import DeviceLayerSelection


@dataclass(frozen=True)
class LayerStep:
    """One layer's part of a step.

    Attributes
    ----------
    keys, values : (tokens, kv_heads, head_size), of the step's tokens.
    pages : (blocks, kv_heads, 32, slab bytes / 32) uint8.
    window : (blocks, kv_heads, block tokens, row bytes) uint8.
    batch, recent : metadata of the pages and of the window.
    bad : (requests,) int64, lowered where a token has numbers that cannot be stored: `BadToken`.
    layer : the layer's number there.
    selection : which pages the layer's decodes read; None: every page.
    """

    keys: torch.Tensor
    values: torch.Tensor
    pages: torch.Tensor
    window: torch.Tensor
    batch: PageMetadata
    recent: WindowMetadata
    bad: torch.Tensor
    layer: int
    selection: "DecodeSelection | DeviceLayerSelection | None" = None

    @property
    def slab_bytes(self) -> int:
        """Bytes from one KV head of a block of pages to the next."""
        return self.pages.stride(1)

    @property
    def window_shift(self) -> int:
        """Log2 of the tokens in a block of the window."""
        return self.window.shape[2].bit_length() - 1


class BlockAttention(Protocol):
    """Attention over blocks on one device, for one shape and pair of formats; layers share it."""

    slab_bytes: int

    def find_first(
        self, block_table: torch.Tensor, lengths: torch.Tensor, starts: torch.Tensor, block_tokens: int, first: torch.Tensor
    ) -> None:
        """Write `WindowMetadata.first`.

        Parameters
        ----------
        block_table, lengths, starts : of the window, as in `WindowMetadata` and `PageMetadata`.
        block_tokens : tokens of a block of the window.
        first : (requests,) int32, what is written.
        """

    def store(self, step: LayerStep) -> None:
        """Store a step's tokens in the window and quantize the pages that they complete."""

    def decode(self, step: LayerStep, query: torch.Tensor, output: torch.Tensor) -> None:
        """Attend with the tokens of decodes: (tokens, query_heads, head_size) each."""

    def prefill(self, step: LayerStep, query: torch.Tensor, output: torch.Tensor) -> None:
        """Attend with the tokens of prompt chunks, which follow those of decodes."""

    def fail(self, step: LayerStep, bad: BadTokens, output: torch.Tensor) -> None:
        """Make outputs NaN from the tokens on that could not be stored, and move their words to where they are logged.

        Parameters
        ----------
        step : of the last layer of the step.
        output : (tokens, query_heads, head_size), of the last layer.
        """

    def reserve(self, tokens: int) -> None:
        """Allocate what a step of `tokens` tokens needs, while vLLM measures how much memory is left for its caches."""


class HeadRotation:
    """Rotates a step's heads as a recipe stores them, and its outputs back: all that a kernel sees is rotated.

    The first step allocates what it needs, while vLLM measures memory: what comes with the weights is lost when vLLM sleeps.

    Parameters
    ----------
    head_dim : channels of a head.
    dtype, device : of the step's tensors; the rotation is a product of matrices in them.
    smoothing : of the layer's KV heads, if keys are rotated: keys are multiplied by its powers of 2, and queries divided.
    """

    def __init__(
        self, recipe: Recipe, head_dim: int, dtype: torch.dtype, device: str, smoothing: Smoothing | None = None
    ) -> None:
        self._keys, self._values = recipe.rotates_keys, recipe.rotates_values
        self._block, self._dtype, self._device = rotated_block(head_dim), dtype, torch.device(device)
        self._smoothing = None if smoothing is None else KeySmoothing(smoothing, self._device)

    @cached_property
    def _matrix(self) -> torch.Tensor:
        return torch.from_numpy(rotated(np.eye(self._block, dtype=np.float32))).to(self._device, self._dtype)

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return a step's queries, keys and values, (tokens, heads, head_dim) each, as the kernels take them."""
        if self._smoothing is not None:
            query, key = self._smoothing.queries(query), self._smoothing.keys(key[:, :, None])[:, :, 0]
        if self._keys:
            query, key = self._rotated(query), self._rotated(key)
        return query, key, self._rotated(value) if self._values else value

    def rotate_back(self, output: torch.Tensor) -> None:
        """Turn outputs, (tokens, heads, head_dim), into those of unrotated values, in place."""
        if self._values:
            output.copy_(self._rotated(output))

    def _rotated(self, rows: torch.Tensor) -> torch.Tensor:
        return (rows.unflatten(-1, (-1, self._block)) @ self._matrix).flatten(-2)
