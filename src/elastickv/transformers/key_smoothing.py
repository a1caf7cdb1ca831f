"""Keys as they are stored where a recipe rotates them and a calibration says how to smooth them before."""

from collections.abc import Sequence

import torch


class KeySmoothing:
    """Powers of 2 that keys are multiplied by before they are stored, channel by channel, and queries divided by.

    The first use allocates them on the device: vLLM loses what is allocated with the weights when it sleeps.

    Parameters
    ----------
    smoothing : [KV head][channel] -> n, of 2^n.
    """

    def __init__(self, smoothing: Sequence[Sequence[int]], device: torch.device) -> None:
        self._exponents, self._device = torch.tensor(smoothing, dtype=torch.float32, device="cpu"), device
        self._of_dtype: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]] = {}

    def keys(self, keys: torch.Tensor) -> torch.Tensor:
        """Return (batch, kv_heads, tokens, head_dim) keys as they are stored."""
        return keys * self.factors(keys.dtype)[0][:, None]

    def stored_keys(self, keys: torch.Tensor) -> torch.Tensor:
        """Return stored keys as the model had them."""
        return keys * self.factors(keys.dtype)[1][:, None]

    def queries(self, queries: torch.Tensor) -> torch.Tensor:
        """Return (batch, query_heads, head_dim) queries of stored keys."""
        factors = self.factors(queries.dtype)[1]
        return (queries.unflatten(1, (len(factors), -1)) * factors[:, None]).flatten(1, 2)

    def factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return those of keys and of queries, (kv_heads, head_dim) each; a graph cannot capture the first call."""
        if dtype not in self._of_dtype:
            exponents = self._exponents
            self._of_dtype[dtype] = exponents.exp2().to(self._device, dtype), (-exponents).exp2().to(self._device, dtype)
        return self._of_dtype[dtype]
