"""The KV cache dtypes that vLLM accepts by name, from 0.33 on."""

import torch
from vllm.config.cache import register_kv_cache_dtype
from vllm.v1.kv_cache_interface import KVQuantMode

from elastickv.vllm.serving_options import CACHE_DTYPES


class PageDtype:
    """A KV cache dtype whose storage the attention backend lays out itself."""

    name = ""

    def torch_dtype(self) -> torch.dtype:
        """Return the dtype of the storage: pages are bytes to vLLM."""
        return torch.uint8

    def quant_mode(self) -> KVQuantMode:
        """Return the mode for which no generic kernel is chosen."""
        return KVQuantMode.CUSTOM


def register_cache_dtypes() -> None:
    """Register `elastickv_int4` and the others as values of `--kv-cache-dtype`."""
    for name in CACHE_DTYPES:
        register_kv_cache_dtype(name)(type("PageDtype", (PageDtype,), {"name": name}))
