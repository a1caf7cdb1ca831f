"""Attention of several queries, each of which sees keys of its own."""

import torch

from elastickv.evaluation.kv_selections.reference_selection import attention_weights
from elastickv.evaluation.prefill import Tensor
from elastickv.transformers.attention import Call


def masked_attention(call: Call, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """Return (batch, new, query_heads, head_dim) outputs, of the query's dtype.

    Parameters
    ----------
    call : with (batch, query_heads, new, head_dim) queries; its mask is not used.
    keys, values : (batch, kv_heads, keys, head_dim).
    seen : bool (new, keys).
    """
    heads, new = keys.shape[1], call.query.shape[2]
    if call.softcap is not None or call.sinks is not None:
        queries = call.query.float().unflatten(1, (heads, -1))
        products = queries @ keys[:, :, None].float().mT * call.scaling
        outputs = attention_weights(products, seen, call.softcap, call.sinks) @ values[:, :, None].float()
        return outputs.flatten(1, 2).transpose(1, 2).to(call.query.dtype)
    # Query heads that share a KV head are further queries of it.
    queries = call.query.unflatten(1, (heads, -1)).flatten(2, 3)
    mask = seen.repeat(queries.shape[2] // new, 1)
    outputs = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=call.scaling)
    return outputs.unflatten(2, (-1, new)).flatten(1, 2).transpose(1, 2).contiguous()
