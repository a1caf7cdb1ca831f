"""Page scorers: how a decode step ranks cold pages. A new scorer is a file here and a line in `SCORERS`."""

from elastickv.errors import UsageError
from elastickv.kvcache.scorers.bounds import BOUNDS
from elastickv.kvcache.scorers.scorer import Scorer, scale_factor, select_pages
from elastickv.recipe import Recipe

__all__ = ["SCORERS", "Scorer", "scale_factor", "scorer_of", "select_pages"]

SCORERS: dict[str, Scorer] = {BOUNDS.name: BOUNDS}


def scorer_of(recipe: Recipe) -> Scorer:
    """Return the scorer that a recipe names.

    Raises
    ------
    UsageError : if there is none of that name.
    """
    if recipe.scorer not in SCORERS:
        raise UsageError(f"scorer {recipe.scorer!r} is unknown: page scorers are {', '.join(SCORERS)}")
    return SCORERS[recipe.scorer]
