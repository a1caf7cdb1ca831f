"""PyTorch's dtypes of models, and their names in recipes and results."""

import torch

from elastickv.errors import UsageError

DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the recipe's name of a dtype.

    Raises
    ------
    UsageError : if no kernel stores it.
    """
    if dtype not in DTYPE_NAMES:
        raise UsageError(f"keys of {dtype} are not supported: load the model in {', '.join(map(str, DTYPE_NAMES))}")
    return DTYPE_NAMES[dtype]


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name.

    Raises
    ------
    UsageError : if there is none.
    """
    if name not in TORCH_DTYPES:
        raise UsageError(f"dtype {name!r} is unknown: choose {', '.join(TORCH_DTYPES)}")
    return TORCH_DTYPES[name]
