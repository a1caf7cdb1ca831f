"""How the views of a model's keys, values and queries become kernel arguments."""

import numpy as np

from elastickv.backends.cuda.arguments import QueryArguments, RowTarget, TokenRows
from elastickv.backends.cuda.device import CudaDevice, DeviceMemory
from elastickv.backends.cuda.kernel_selection import TYPES
from elastickv.kvcache.tensor_view import Float32, TensorView


def token_rows(keys: TensorView, values: TensorView) -> TokenRows:
    """Return the arguments of kernels that read tokens, (batch, kv_heads, tokens, dim), or one: (batch, kv_heads, dim)."""
    key_batch_stride, key_head_stride, key_token_stride = _token_strides(keys)
    value_batch_stride, value_head_stride, value_token_stride = _token_strides(values)
    return TokenRows(
        keys=keys.address,
        values=values.address,
        key_batch_stride=key_batch_stride,
        key_head_stride=key_head_stride,
        key_token_stride=key_token_stride,
        value_batch_stride=value_batch_stride,
        value_head_stride=value_head_stride,
        value_token_stride=value_token_stride,
        type=TYPES[keys.dtype],
        dim=keys.shape[-1],
    )


def _token_strides(rows: TensorView) -> tuple[int, int, int]:
    """Return the elements from one sequence, head and token to the next; 0 for a single token without a dimension."""
    batch, head, *token = rows.strides[:-1]
    return batch, head, token[0] if token else 0


def row_target(keys: TensorView, values: TensorView) -> RowTarget:
    """Return the arguments of a kernel that writes contiguous (batch, kv_heads, tokens, dim) keys and values."""
    return RowTarget(keys=keys.address, values=values.address, type=TYPES[keys.dtype], dim=keys.shape[-1])


def query_arguments(rows: TensorView | None, queries: DeviceMemory, group: int, scale: float) -> QueryArguments:
    """Return the arguments by which an append copies `rows`, (batch, query_heads, dim), to `queries`, times `scale`.

    Without `rows` it copies nothing.
    """
    return QueryArguments(
        query_rows=None if rows is None else rows.address,
        query_batch_stride=0 if rows is None else rows.strides[0],
        query_head_stride=0 if rows is None else rows.strides[1],
        queries=queries,
        group=group,
        query_scale=scale,
    )


class StagedTokens:
    """Keys and values from the host, (batch, kv_heads, tokens, head_dim), in device memory that is freed with the object."""

    def __init__(self, device: CudaDevice, keys: Float32, values: Float32) -> None:
        _, heads, tokens, dim = keys.shape
        strides = (heads * tokens * dim, tokens * dim, dim, 1)
        self._memory: list[DeviceMemory] = []
        for array in (keys, values):
            self._memory.append(device.allocate(4 * array.size))
            device.upload(self._memory[-1], np.ascontiguousarray(array, np.float32))
        self.keys, self.values = (TensorView(memory.pointer, "fp32", keys.shape, strides) for memory in self._memory)
