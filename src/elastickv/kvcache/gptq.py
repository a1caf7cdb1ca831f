"""Rounding that makes the error of one channel good in those that follow: GPTQ (Frantar et al. 2022, arXiv 2210.17323).

An error e of a token's key costs the scores of its queries e H e^T on average, with H = E[q q^T] over the queries of its KV
head; an error of a value costs the layer's output a multiple of e H e^T, with H = W_o^T W_o of the head's columns. Codes are
chosen one channel after the other: what the code of a channel leaves over is subtracted, in the shares that cost least, from
the channels that are still to come. Scales, zeros, bytes and what reads them are those of rounding to the nearest code. Every
token is on its own.

Where a recipe rotates, errors are of what is stored: H is transformed as the tensor is. All backends subtract in float32 in
the same order, so their codes are the same bit for bit.
"""

import base64
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elastickv.errors import UsageError
from elastickv.kvcache.hadamard import rotated
from elastickv.recipe import FORMATS, Recipe
from elastickv.recipe.calibration import Smoothing, StorageStatistics

DAMPING = 0.01  # share of the mean of the diagonal that is added to it
_LARGEST = 32767


@dataclass(frozen=True)
class Compensation:
    """How the errors of channels are made good, for the KV heads of K or of V.

    Attributes
    ----------
    order : (kv_heads, head_dim) int64, the channels in the order in which they are rounded.
    shares : (kv_heads, head_dim, head_dim) float32: [h, j, i] times the error of the i-th channel in order is subtracted from
        the j-th; 0 unless i < j.
    """

    order: NDArray[np.int64]
    shares: NDArray[np.float32]

    @classmethod
    def of(cls, hessians: NDArray[np.float64]) -> "Compensation":
        """Return how errors are made good by Hessians, (kv_heads, head_dim, head_dim).

        A hundredth of the mean of its diagonal is added to the diagonal of each. The channels of the largest diagonal come
        first: they have the most channels to follow. With the Cholesky factor U^T U of the inverse, an error of channel i takes
        U[i, j] / U[i, i] of it from channel j.

        Raises
        ------
        UsageError : if a Hessian is not positive definite.
        """
        diagonals = np.diagonal(hessians, axis1=1, axis2=2)
        damped = hessians + DAMPING * np.maximum(diagonals.mean(axis=1), 1e-30)[:, None, None] * np.eye(hessians.shape[-1])
        order = np.argsort(-diagonals, axis=1, kind="stable")
        shares = np.empty(hessians.shape, np.float32)
        for head, channels in enumerate(order):
            try:
                inverse = np.linalg.inv(damped[head][np.ix_(channels, channels)])
                lower = np.linalg.cholesky(inverse)  # L = U^T
            except np.linalg.LinAlgError:
                raise UsageError("a Hessian of the calibration is not positive: run `elastickv calibrate` again") from None
            shares[head] = np.tril(lower / np.diagonal(lower), -1)
        return cls(np.ascontiguousarray(order, np.int64), shares)


@dataclass(frozen=True)
class LayerCompensation:
    """The compensation of a layer's K and V; None where codes are the nearest."""

    keys: Compensation | None
    values: Compensation | None


def layer_compensation(recipe: Recipe, head_dim: int, statistics: StorageStatistics) -> LayerCompensation | None:
    """Return the compensation of a layer by what a calibration knows; None if the recipe rounds to the nearest code.

    Parameters
    ----------
    head_dim : channels as stored; those that the calibration lacks are zeros.

    Raises
    ------
    UsageError : if the recipe needs Hessians, and the calibration has none.
    """
    if not recipe.uses_hessians:
        return None
    if statistics.key_hessians is None or statistics.value_hessians is None:
        raise no_hessians(recipe)
    keys = [hessian_of(text, head_dim) for text in statistics.key_hessians]
    values = [hessian_of(text, head_dim) for text in statistics.value_hessians]
    smoothing = statistics.smoothing if recipe.rotates_keys else None
    return LayerCompensation(
        _of_tensor(recipe.key_format, transformed(np.array(keys), recipe.rotates_keys, smoothing)),
        _of_tensor(recipe.value_format, transformed(np.array(values), recipe.rotates_values)),
    )


def no_hessians(recipe: Recipe) -> UsageError:
    """Return the error of a recipe that needs Hessians where there are none."""
    return UsageError(
        f"{recipe} needs a calibration with Hessians: run `elastickv calibrate` and give its file, or leave out "
        f"rounding={recipe.rounding}"
    )


def check_compensation(recipe: Recipe, compensation: LayerCompensation | None) -> None:
    """Raise `no_hessians` if a recipe needs a compensation and there is none."""
    if recipe.uses_hessians and compensation is None:
        raise no_hessians(recipe)


def _of_tensor(fmt: str | None, hessians: NDArray[np.float64]) -> Compensation | None:
    return Compensation.of(hessians) if fmt is not None and FORMATS[fmt].is_integer else None


def transformed(hessians: NDArray[np.float64], is_rotated: bool, smoothing: Smoothing | None = None) -> NDArray[np.float64]:
    """Return the Hessians of tensors as they are stored: with rows x S R for x, they are R^T S^-1 H S^-1 R.

    Parameters
    ----------
    hessians : (kv_heads, head_dim, head_dim) of the model's own keys or values.
    is_rotated : whether they are stored rotated.
    smoothing : [KV head][channel] -> n: channels are multiplied by 2^n before, which the queries are divided by.
    """
    if smoothing is not None:
        exponents = np.zeros(hessians.shape[:2])
        exponents[:, : len(smoothing[0])] = smoothing
        hessians = hessians * np.exp2(-exponents)[:, :, None] * np.exp2(-exponents)[:, None, :]
    if not is_rotated:
        return hessians
    return np.swapaxes(rotated(np.swapaxes(rotated(hessians), 1, 2)), 1, 2)


def gptq_codes(
    x: NDArray[np.float32],
    scales: NDArray[np.float32],
    zeros: NDArray[np.float32],
    low: float,
    high: float,
    order: NDArray[np.int64],
    shares: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Return the codes of rows, chosen channel by channel.

    Parameters
    ----------
    x, scales, zeros : (..., head_dim) float32; a code c stands for scale * c + zero.
    low, high : the least and the greatest code.
    order, shares : of one KV head, as in `Compensation`.
    """
    rest = np.moveaxis(x - zeros, -1, 0)[order]
    steps = np.moveaxis(np.broadcast_to(scales, x.shape), -1, 0)[order]
    codes = np.empty_like(rest)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        for j in range(len(order)):
            position = rest[j] / steps[j]
            whole = np.where(position > np.float32(low), np.minimum(position, np.float32(high)), np.float32(low))
            codes[j] = np.where(steps[j] > 0, np.rint(whole), np.float32(0))
            error = rest[j] - codes[j] * steps[j]
            rest[j + 1 :] -= error * shares[j + 1 :, j].reshape(-1, *(1,) * error.ndim)
    of_channels = np.empty_like(codes)
    of_channels[order] = codes
    return np.moveaxis(of_channels, 0, -1)


def hessian_text(hessian: NDArray[np.float64]) -> str:
    """Return a symmetric matrix without negative eigenvalues as text: base64 of its diagonal, then of correlations.

    The diagonal is little-endian float32. Then come H[i, j] / sqrt(H[i, i] H[j, j]) for i < j, row by row, in units of
    1 / 32767 as little-endian int16: their rounding moves no eigenvalue by more than 2^-16 of the trace, which is less than the
    damping of `Compensation.of` up to 256 channels.
    """
    matrix = np.asarray(hessian, np.float64)
    diagonal = np.maximum(np.diagonal(matrix), 0)
    roots = np.sqrt(diagonal)
    product = np.outer(roots, roots)
    correlations = np.divide(matrix, product, out=np.zeros_like(matrix), where=product > 0)[np.triu_indices(len(matrix), 1)]
    whole = np.rint(_LARGEST * np.clip(correlations, -1, 1)).astype("<i2")
    return base64.b64encode(diagonal.astype("<f4").tobytes() + whole.tobytes()).decode("ascii")


def hessian_of(text: str, head_dim: int) -> NDArray[np.float64]:
    """Return the (head_dim, head_dim) matrix of a text of `hessian_text`; channels that it lacks are zeros."""
    content = base64.b64decode(text)
    own = (round((9 + 4 * len(content)) ** 0.5) - 3) // 2  # 4 n + n (n - 1) bytes
    roots = np.sqrt(np.frombuffer(content, "<f4", own).astype(np.float64))
    correlations = np.zeros((own, own))
    correlations[np.triu_indices(own, 1)] = np.frombuffer(content, "<i2", offset=4 * own) / _LARGEST
    matrix = np.zeros((head_dim, head_dim))
    matrix[:own, :own] = (correlations + correlations.T + np.eye(own)) * np.outer(roots, roots)
    return matrix
