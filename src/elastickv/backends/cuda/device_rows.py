"""Keys, values and queries of a model in device memory, as a cache takes them."""

from dataclasses import dataclass

import numpy as np

from elastickv.backends.cuda.arguments import QueryArguments, TokenRows
from elastickv.backends.cuda.device import CudaDevice, DeviceMemory
from elastickv.backends.cuda.kernel_selection import TYPES
from elastickv.kvcache.layer import Float32


@dataclass(frozen=True)
class DeviceRows:
    """Tokens in device memory, (batch, heads, tokens, head_dim), with contiguous channels.

    Attributes
    ----------
    pointer : address of the first.
    dtype : 'fp32', 'fp16' or 'bf16'.
    strides : elements from one sequence, head and token to the next.
    head_dim : channels that are present; the rest, up to the cache's, are zeros.
    """

    pointer: int
    dtype: str
    strides: tuple[int, int, int]
    head_dim: int


@dataclass(frozen=True)
class KeyValueRows:
    """Keys and values of the same tokens, of one dtype."""

    keys: DeviceRows
    values: DeviceRows

    @property
    def arguments(self) -> TokenRows:
        """The arguments of kernels that read these tokens."""
        keys, values = self.keys, self.values
        return TokenRows(
            keys=keys.pointer,
            values=values.pointer,
            key_batch_stride=keys.strides[0],
            key_head_stride=keys.strides[1],
            key_token_stride=keys.strides[2],
            value_batch_stride=values.strides[0],
            value_head_stride=values.strides[1],
            value_token_stride=values.strides[2],
            type=TYPES[keys.dtype],
            dim=keys.head_dim,
        )


class StagedTokens:
    """Keys and values from the host, (batch, kv_heads, tokens, head_dim), in device memory that is freed with the object."""

    def __init__(self, device: CudaDevice, keys: Float32, values: Float32) -> None:
        _, heads, tokens, dim = keys.shape
        strides = (heads * tokens * dim, tokens * dim, dim)
        self._memory: list[DeviceMemory] = []
        for array in (keys, values):
            self._memory.append(device.allocate(4 * array.size))
            device.upload(self._memory[-1], np.ascontiguousarray(array, np.float32))
        self.rows = KeyValueRows(*(DeviceRows(memory.pointer, "fp32", strides, dim) for memory in self._memory))


def query_arguments(rows: DeviceRows | None, queries: DeviceMemory, group: int, scale: float) -> QueryArguments:
    """Return the arguments by which an append copies `rows` to `queries`, times `scale`; None copies nothing."""
    return QueryArguments(
        query_rows=None if rows is None else rows.pointer,
        query_batch_stride=0 if rows is None else rows.strides[0],
        query_head_stride=0 if rows is None else rows.strides[1],
        queries=queries,
        group=group,
        query_scale=scale,
    )
