"""Errors of one attention output against another."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class ErrorSummary:
    """Mean, 95th percentile and maximum of relative L2 errors, and their number."""

    mean: float
    p95: float
    max: float
    count: int


def relative_l2(output: ArrayLike, reference: ArrayLike) -> np.ndarray:
    """Return ||output - reference|| / ||reference|| over the last axis; infinite where a value is not finite."""
    out, ref = np.asarray(output, np.float64), np.asarray(reference, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.linalg.norm(out - ref, axis=-1) / np.linalg.norm(ref, axis=-1)
    error = np.where((out == ref).all(axis=-1), 0.0, error)
    return np.where(np.isfinite(error), error, np.inf)


def summarize(errors: ArrayLike) -> ErrorSummary:
    """Summarize an array of errors of any shape."""
    flat = np.asarray(errors, np.float64).ravel()
    return ErrorSummary(float(flat.mean()), float(np.quantile(flat, 0.95)), float(flat.max()), flat.size)
