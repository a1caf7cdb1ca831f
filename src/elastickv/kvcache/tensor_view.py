"""Tensors by address: what a cache takes from PyTorch without importing it."""

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastickv.kvcache.rounding import from_bf16_bits, to_bf16_bits

Float32 = NDArray[np.float32]
_ELEMENTS: dict[str, type[np.generic]] = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}


@dataclass(frozen=True)
class TensorView:
    """A tensor in the memory of a cache's device. The caller keeps that memory alive until the queued work has run.

    Attributes
    ----------
    address : of the first element.
    dtype : 'fp32', 'fp16' or 'bf16'.
    shape : elements along each dimension; the last one is `head_dim`, except in log-sum-exps.
    strides : elements from one index of a dimension to the next. The last one is 1.
    """

    address: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements follow each other without gaps."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size > 1 and stride != expected:
                return False
            expected *= size
        return True


Tensor = Float32 | TensorView


def to_array(tensor: Tensor, head_dim: int) -> Float32:
    """Return a tensor in host memory as float32, with zeros in the channels that it lacks up to `head_dim`.

    The result shares memory with `tensor` where neither the dtype nor the channels change.
    """
    if not isinstance(tensor, TensorView):
        return tensor
    elements = _elements(tensor)
    values = from_bf16_bits(elements) if tensor.dtype == "bf16" else elements.astype(np.float32, copy=False)
    missing = head_dim - tensor.shape[-1]
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)]) if missing else values


def write_array(target: TensorView, values: NDArray[np.floating[Any]]) -> None:
    """Write the channels that a tensor in host memory has, rounded to its dtype."""
    wanted = values[..., : target.shape[-1]]
    _elements(target)[...] = to_bf16_bits(wanted) if target.dtype == "bf16" else wanted


def _elements(tensor: TensorView) -> NDArray[Any]:
    element = np.dtype(_ELEMENTS[tensor.dtype])
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, element)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    memory: Any = (ctypes.c_char * ((last + 1) * element.itemsize)).from_address(tensor.address)
    strides = [stride * element.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(np.frombuffer(memory, element), tensor.shape, strides)
