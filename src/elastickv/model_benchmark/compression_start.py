"""From which context on a cache reads fewer bytes than a dense one: known from the configuration, before weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elastickv.recipe import PAGE_TOKENS
from elastickv.recipe.shape import MAX_CONTEXT
from elastickv.results.kinds.model_result import CompressionStart
from elastickv.transformers.budget import Budget
from elastickv.transformers.config import config_for
from elastickv.transformers.model_support import sizes_of


def compression_start(
    model: Any, wanted: Mapping[str, Any], prompt_tokens: int, capacity: int, dtype: str
) -> CompressionStart | None:
    """Return where compression starts for a prompt. None for a model without elastic layers.

    Parameters
    ----------
    model : it needs no weights.
    wanted : keyword arguments of `ElasticCache.for_model`: compress, recipe, calibration.
    capacity : tokens of prompt and text.
    dtype : of the model, such as 'bf16'.

    Raises
    ------
    UsageError : if the model is not supported, or the arguments contradict each other.
    """
    sizes, compress = sizes_of(model), wanted.get("compress")
    config = config_for(sizes, compress, wanted.get("recipe"), None, wanted.get("calibration"), None, capacity, "stored")
    if not sizes.elastic:
        return None
    budget = config.budget_for(max(prompt_tokens, config.usual), dtype)
    return CompressionStart(_reads_less_from(budget), _ratio_from(budget, compress))


def _ratio(budget: Budget, context: int) -> float:
    return budget.ratio_at(context, budget.reading(context).scale)


def _before_first_page(budget: Budget) -> int:
    """Return the tokens that are exact in every layer, whatever the recipe."""
    return min(recipe.sinks + recipe.window for recipe in budget.recipes.values())


def _reads_less_from(budget: Budget) -> int | None:
    first = _before_first_page(budget)
    pages = [*range(first + 1, first + 2 * PAGE_TOKENS + 1), *(first + (PAGE_TOKENS << power) for power in range(2, 12))]
    return next((context for context in pages if _ratio(budget, context) > 1), None)


def _ratio_from(budget: Budget, compress: float | None) -> int | None:
    if compress is None or budget.whole():
        return None
    if budget.holds_from > 1:
        return budget.holds_from
    # Until a page is full its tokens are exact: the worst context is the one before.
    first = _before_first_page(budget)
    low, high = 0, MAX_CONTEXT // PAGE_TOKENS - first // PAGE_TOKENS - 2
    if _ratio(budget, first + PAGE_TOKENS * (high + 1) - 1) < compress:
        return None
    while low < high:
        middle = (low + high) // 2
        meets = _ratio(budget, first + PAGE_TOKENS * (middle + 1) - 1) >= compress
        low, high = (low, middle) if meets else (middle + 1, high)
    return first + PAGE_TOKENS * low
