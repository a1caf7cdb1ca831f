"""The largest C whose loss is within a tolerance."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from elastickv.errors import UsageError

_FIGURES = {"ppl": "ppl_change_percent", "kl": "kl", "top1": "top1_percent"}


@dataclass(frozen=True)
class Tolerance:
    """A bound on one figure: an upper one on the change of perplexity (percent) or KL (nats), a lower one on top-1."""

    figure: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> "Tolerance":
        """Return what `ppl=0.5%`, `kl=0.01` or `top1=96%` says.

        Raises
        ------
        UsageError : if it is none of these.
        """
        match = re.fullmatch(r"(ppl|kl|top1)=([0-9]{0,15}\.?[0-9]{1,15})(%?)", text.strip())
        if not match or (match[3] and match[1] == "kl"):
            raise UsageError(f"`tolerance`={text} is no bound: write ppl=0.5%, kl=0.01 or top1=96%")
        return cls(match[1], float(match[2]))

    def __str__(self) -> str:
        return f"{self.figure}={self.bound:g}{'' if self.figure == 'kl' else '%'}"

    def holds(self, row: dict[str, Any]) -> bool:
        """Whether the mean of a row's figure is within the bound."""
        mean = float(row[_FIGURES[self.figure]]["mean"])
        return mean >= self.bound if self.figure == "top1" else mean <= self.bound

    def surely(self, row: dict[str, Any]) -> bool:
        """Whether the whole interval of a row's figure is within the bound; a single window has no interval."""
        if row.get("windows") == 1:
            return False
        figure = row[_FIGURES[self.figure]]
        return bool(figure["low"] >= self.bound) if self.figure == "top1" else bool(figure["high"] <= self.bound)


def suggest(rows: Sequence[dict[str, Any]], tolerance: Tolerance) -> dict[str, Any]:
    """Return the largest C within the tolerance at every context it was measured at, and every smaller C with it.

    Returns
    -------
    compress : the ratio; None if not even the smallest is within the tolerance.
    certain : whether the whole intervals are within, not only the means.
    """
    ratios = sorted({row["compress"] for row in rows if row["compress"] is not None})
    best, certain = None, False
    for ratio in ratios:
        mine = [row for row in rows if row["compress"] == ratio]
        if not all(map(tolerance.holds, mine)):
            break
        best, certain = ratio, all(map(tolerance.surely, mine))
    return {"tolerance": str(tolerance), "compress": best, "certain": certain}
