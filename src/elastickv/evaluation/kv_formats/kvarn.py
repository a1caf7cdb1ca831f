"""KVarN: tiles of 128 tokens, rotated and normalized in variance, then keys per channel and values per token.

Muller et al. 2026 (arXiv 2606.03458); huawei-csl/KVarN, `vllm/model_executor/layers/quantization/kvarn/config.py`,
`vllm/v1/attention/ops/triton_kvarn_sinkhorn.py` and the reference in `ascend_kernel/kvarn_store_tile_k/api_test.py`. The first
128 tokens and the tile that is being filled stay in 16 bit; a full tile is quantized before the next step. Stored for a tile:
codes, a float16 scale and zero for each channel of K (each token of V), and a float16 scale for each token of K (channel of V).
The plain ones have no rotation and no normalization, and so no second scale.
"""

from functools import partial

import torch

from elastickv.evaluation.kv_formats.reference_format import ReferenceFormat, StoredPlane
from elastickv.evaluation.kv_formats.rotations import by_blocks, hadamard
from elastickv.evaluation.kv_formats.rounding_modes import to_half, uniform_codes
from elastickv.evaluation.prefill import Tensor
from elastickv.kvcache.hadamard import rotated_block

TILE = 128
SINKS = 128
_HALF_BYTES = 2
_ITERATIONS = 16
_DEVIATIONS = (1e-3, 1e3)
_LOG_SCALES = (-0.3, 10.0)


def variance_scales(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales of rows and of columns after which all rows and columns of a tile have about one standard deviation.

    Rows and columns are divided by their deviations in turns; what counts is the turn after which these differ least.

    Parameters
    ----------
    tiles : (..., rows, columns).

    Returns
    -------
    row_scales, column_scales : (..., rows, 1) and (..., 1, columns).
    """
    log_rows, log_columns = torch.zeros_like(tiles[..., :1]), torch.zeros_like(tiles[..., :1, :])
    best = (log_rows.exp(), log_columns.exp())
    current, least = tiles, _imbalance(tiles)
    for _ in range(_ITERATIONS):
        log_columns = (log_columns + current.std(-2, keepdim=True).clamp(*_DEVIATIONS).log()).clamp(*_LOG_SCALES)
        current = tiles / log_columns.exp() / log_rows.exp()
        log_rows = (log_rows + current.std(-1, keepdim=True).clamp(*_DEVIATIONS).log()).clamp(*_LOG_SCALES)
        current = tiles / log_columns.exp() / log_rows.exp()
        imbalance = _imbalance(current)
        better = imbalance <= least
        best = (torch.where(better, log_rows.exp(), best[0]), torch.where(better, log_columns.exp(), best[1]))
        least = torch.where(better, imbalance, least)
    return best


def _imbalance(tiles: Tensor) -> Tensor:
    rows, columns = tiles.std(-1, keepdim=True), tiles.std(-2, keepdim=True)
    parts = ((rows, -2), (columns, -1))
    ratios = [part.amax(dim, keepdim=True) / part.amin(dim, keepdim=True).clamp_min(1e-8) for part, dim in parts]
    return ratios[0] + ratios[1]


def _by_row(tiles: Tensor, bits: int, normalized: bool) -> Tensor:
    """Quantize each row of (..., rows, columns) tiles."""
    rows, columns = variance_scales(tiles) if normalized else (torch.ones(()).to(tiles), torch.ones(()).to(tiles))
    quantized = uniform_codes(tiles / rows / columns, bits, -1)
    return (quantized.codes * to_half(quantized.scale * rows) + to_half(quantized.zero * rows)) * to_half(columns)


def _round_trip(x: Tensor, bits: int, of_keys: bool, normalized: bool) -> Tensor:
    rotation = hadamard(rotated_block(x.shape[-1]) if normalized else 1)
    tiles = by_blocks(x, rotation).unflatten(-2, (-1, TILE))
    rounded = _by_row(tiles.mT, bits, normalized).mT if of_keys else _by_row(tiles, bits, normalized)
    return by_blocks(rounded.flatten(-3, -2), rotation)


def _plane(bits: int, of_keys: bool, normalized: bool) -> StoredPlane:
    def tile_bytes(head_dim: int) -> int:
        rows, columns = (head_dim, TILE) if of_keys else (TILE, head_dim)
        return head_dim * TILE * bits // 8 + (2 * rows + normalized * columns) * _HALF_BYTES

    round_trip = partial(_round_trip, bits=bits, of_keys=of_keys, normalized=normalized)
    return StoredPlane(round_trip, tile_bytes, group=TILE, window=1)


def _format(name: str, key_bits: int, value_bits: int, normalized: bool = True) -> ReferenceFormat:
    source = "KVarN (arXiv 2606.03458), huawei-csl/KVarN"
    return ReferenceFormat(
        name,
        _plane(key_bits, of_keys=True, normalized=normalized),
        _plane(value_bits, of_keys=False, normalized=normalized),
        source if normalized else f"{source}, without rotation and normalization",
        SINKS,
    )


KVARN_K4V2 = _format("kvarn_k4v2_g128", 4, 2)
KVARN_K4V4 = _format("kvarn_k4v4_g128", 4, 4)
KVARN_K4V4_PLAIN = _format("kvarn_k4v4_g128_plain", 4, 4, normalized=False)
