"""The recipes of a ratio taken apart: their formats with all pages read, and their pages in 16 bit.

Together with the ratio itself this says how much of its loss is rounding and how much is what is left out.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from elastickv.errors import UsageError
from elastickv.evaluation import sessions
from elastickv.evaluation.evaluation_options import PARTS_METHOD
from elastickv.evaluation.kv_selections.recipe_pages import pages_read, read_bytes
from elastickv.evaluation.kv_selections.reference_selection import token_bytes
from elastickv.evaluation.recipes_by_ratio import RatioRecipes, Span, measured
from elastickv.evaluation.subject import DecodePath, Subject
from elastickv.recipe import Recipe, stored_bits
from elastickv.recipe.formats import PAGE_TOKENS
from elastickv.recipe.regions import regions

_SOURCE = "the pages that the recipes at this C read"


def part_paths(subject: Subject, ratios: Sequence[float], span: Span) -> list[DecodePath]:
    """Return two paths for each ratio: `C=4 formats alone` and `C=4 selection alone`.

    Ratios that no recipe meets, and those whose recipes read all pages, have none.

    Parameters
    ----------
    span : as for the ratios themselves, whose recipes these are.
    """
    paths = []
    for ratio in ratios:
        try:
            solved = subject.plan(ratio, span)
        except UsageError:
            continue
        if any(recipe.selection == "pages" for recipe in solved.recipes):
            paths += [_formats_alone(subject, solved, span), _selection_alone(subject, solved, span)]
    return paths


def _formats_alone(subject: Subject, solved: RatioRecipes, span: Span) -> DecodePath:
    recipes = [
        replace(recipe, selection="all", fractions=(), anchor_every=1, scorer=Recipe.scorer)
        if recipe.selection == "pages"
        else recipe
        for recipe in solved.recipes
    ]
    alone = measured(1.0, recipes, span, subject.shape, subject.dtype)
    end, shape = span.first + span.steps, subject.shape
    elements = 2 * end * shape.kv_heads * subject.head_dim * len(recipes)
    exact = [end if recipe.is_dense else regions(end, recipe.sinks, recipe.window).exact for recipe in recipes]
    figures: dict[str, Any] = {
        "compress": None,
        "recipe_hash": alone.hash,
        "recipes": [str(recipe) for recipe in recipes],
        "read_ratio": alone.read_ratio,
        "stored_ratio": alone.stored_ratio,
        "step_bytes_read": alone.step_bytes,
        "bytes_stored": alone.stored_bytes,
        "expected_error": None,
        "stored_format": {
            "bits_per_element": sum(stored_bits(recipe, shape.head_dim) for recipe in recipes) / len(recipes),
            "stored_bits_per_element": 8 * alone.stored_bytes / elements,
            "sinks": max(recipe.sinks for recipe in recipes),
            "exact_keys": max(exact),
            "exact_values": max(exact),
            "source": f"recipes of C={solved.ratio:g}, all pages read",
        },
    }
    return DecodePath(f"C={solved.ratio:g} formats alone", subject.decoding(alone.recipes), figures)


def _selection_alone(subject: Subject, solved: RatioRecipes, span: Span) -> DecodePath:
    recipes, shape, end = solved.recipes, subject.shape, span.first + span.steps
    dense = len(recipes) * shape.kv_heads * token_bytes(shape.head_dim) * sum(range(span.first + 1, end + 1))
    read = sum(read_bytes(recipe, span, shape, subject.dtype) for recipe in recipes)
    # A page's scales and zeros are 4 bytes for each channel of its keys.
    bounds = sum(regions(end, r.sinks, r.window).cold // PAGE_TOKENS for r in recipes if r.selection == "pages")
    stored_dense = len(recipes) * shape.kv_heads * token_bytes(shape.head_dim) * end
    stored = stored_dense + bounds * shape.kv_heads * 4 * shape.head_dim
    size = sum(pages_read(r, end, r.steps_since_refresh(span.steps - 1), shape.kv_heads) for r in recipes)
    figures: dict[str, Any] = {
        "compress": None,
        "read_ratio": dense / read,
        "stored_ratio": stored_dense / stored,
        "step_bytes_read": read / span.steps,
        "bytes_stored": stored,
        "selection": {
            "method": PARTS_METHOD,
            "compress": solved.ratio,
            "size": size,
            "unit": "pages of all heads",
            "dense_layers": sum(recipe.selection != "pages" for recipe in recipes),
            "source": _SOURCE,
        },
    }
    decoding = lambda start, _: sessions.recipe_pages(subject.model, recipes, start)  # noqa: E731
    return DecodePath(f"C={solved.ratio:g} selection alone", decoding, figures)
