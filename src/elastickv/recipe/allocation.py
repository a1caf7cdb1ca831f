"""Allot pages to KV heads by their measured errors: the least total error for a number of pages."""

from collections.abc import Mapping, Sequence

from elastickv.errors import UsageError

Calibration = Mapping[float, Sequence[float]]
"""Fraction of the cold pages that are read -> error of each KV head of one layer."""


def check_calibration(calibration: Calibration, kv_heads: int) -> None:
    """Refuse a calibration that does not describe `kv_heads` heads.

    Raises
    ------
    UsageError : naming what is missing or out of range.
    """
    if len(calibration) < 2:
        raise UsageError(f"a calibration needs the errors at two fractions or more: there are {len(calibration)}")
    for fraction, errors in calibration.items():
        if not 0 < fraction <= 1:
            raise UsageError(f"calibrated fraction {fraction} is out of range: above 0 and at most 1 is accepted")
        if len(errors) != kv_heads:
            raise UsageError(f"the calibration has {len(errors)} errors at fraction {fraction} for {kv_heads} KV heads")
        if not all(0 <= error < float("inf") for error in errors):
            raise UsageError(f"the calibration has an error at fraction {fraction} that is negative or not finite")


def allot(calibration: Calibration, pages: int, total: int) -> list[int]:
    """Return the number of pages that each KV head reads, at least one: the least summed error with `total` pages.

    The errors are joined by lines over fractions and made convex from below. Then minimizing error + lambda * pages takes the
    steepest pieces first, for the lambda at which `total` pages are spent (Everett 1963); a head's last piece may be cut short.
    Below its least calibrated fraction a head is taken to lose as steeply as on its first piece.

    Parameters
    ----------
    calibration : errors by fraction, as `check_calibration` accepts.
    pages : cold pages of each head.
    total : pages that all heads together may read.
    """
    fractions = sorted(calibration)
    kv_heads = len(calibration[fractions[0]])
    counts = [min(1, pages)] * kv_heads
    left = max(0, total - sum(counts))
    pieces: list[tuple[float, int, int]] = []
    for head in range(kv_heads):
        hull = _hull([(fraction, calibration[fraction][head]) for fraction in fractions])
        for number, ((x0, y0), (x1, y1)) in enumerate(zip(hull, hull[1:], strict=False)):
            start = 1 if number == 0 else max(1, int(x0 * pages))
            pieces.append(((y1 - y0) / (x1 - x0), head, max(0, int(x1 * pages) - start)))
    # Equal slopes go round the heads in order; what gains nothing is spent last, so that the budget is used.
    for _, head, length in sorted(pieces):
        taken = min(length, left)
        counts[head] += taken
        left -= taken
    for head in range(kv_heads):
        taken = min(pages - counts[head], left)
        counts[head] += taken
        left -= taken
    return counts


def _hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the lower convex hull of points of rising x."""
    hull: list[tuple[float, float]] = []
    for point in points:
        while len(hull) > 1 and _turn(hull[-2], hull[-1], point) <= 0:
            hull.pop()
        hull.append(point)
    return hull


def _turn(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
