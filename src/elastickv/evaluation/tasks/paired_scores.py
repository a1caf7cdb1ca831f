"""Scores of caches beside full attention's on the same items: means, and paired differences with their intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from elastickv.evaluation.metrics import estimate

SECOND_WORDING = "full, second wording"
FULL = "full"


def paired_record(name: str, scores: Sequence[float], full: Sequence[float], figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a result says of one cache on one task, as JSON values.

    The means have 95 % percentile bootstrap intervals (Efron 1979) over items. Differences are of pairs: an item through the
    cache minus the same item with full attention, in percentage points.

    Parameters
    ----------
    scores, full : of each item, from 0 to 1.
    figures : what a decode path says of recipes and bytes.
    """
    own, other = np.asarray(scores, np.float64), np.asarray(full, np.float64)
    return {
        "cache": name,
        "score_percent": asdict(estimate(own, shown=lambda mean: 100 * mean)),
        "difference_points": asdict(estimate(own - other, shown=lambda mean: 100 * mean)),
        "worse": int((own < other).sum()),
        "better": int((own > other).sum()),
        "scores": [float(score) for score in own],
        **{key: figures[key] for key in ("recipe_hash", "read_ratio", "stored_ratio") if key in figures},
    }
