"""`bench --model` at the size of a reference, with the price of the very recipe that was timed."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from elastickv.benchmark.reporter import Reporter
from elastickv.errors import UsageError
from elastickv.evaluation import sessions
from elastickv.evaluation.prefill import check_layers, prefill
from elastickv.evaluation.scoring import score
from elastickv.evaluation.texts import Text, windows
from elastickv.model_benchmark.bench import ModelBench, load
from elastickv.model_benchmark.bench import measure as measure_speed
from elastickv.model_benchmark.generation import ELASTIC, STOCK
from elastickv.model_benchmark.quality_delta import QualityDelta, quality_delta
from elastickv.recipe import Recipe
from elastickv.transformers.cuda_graph.model_patch import release
from elastickv.transformers.model_loading import Loaded


def measure(options: ModelBench, text: Text, scored: int, command: tuple[str, ...], progress: Reporter) -> dict[str, Any]:
    """Return the result of `bench --model` as JSON values, with `fidelity`, or why it is not measured.

    Parameters
    ----------
    text : whose tokens are predicted.
    scored : predictions that are held against those of full attention; 0 leaves them out.

    Raises
    ------
    UsageError : as `bench --model` does.
    """
    if scored < 0:
        raise UsageError(f"`scored`={scored} is out of range: give a whole number from 0 up")
    progress.phase("loading")
    loaded = load(options)
    result = measure_speed(options, command, progress, loaded)
    found, reason = _price(loaded, options.context, result["caches"][-1], text, scored, progress)
    return result | {"fidelity": None if found is None else asdict(found), "fidelity_not_measured": reason}


def _price(
    loaded: Loaded, context: int, elastic: Mapping[str, Any], text: Text, scored: int, progress: Reporter
) -> tuple[QualityDelta | None, str | None]:
    """Return what the recipes of the timed cache cost at the timed context, or why that is not measured."""
    assert elastic["cache"] == ELASTIC
    if not scored:
        return None, "not asked for: --scored 0"
    if loaded.tokenizer is None:
        return None, "random weights have nothing to lose"
    recipes = [Recipe.parse(recipe) for recipe in elastic["recipes"].values()]
    try:
        check_layers(loaded.model)
        rows = windows([text], loaded.tokenizer, context + scored + 1, 1)
    except UsageError as error:
        return None, str(error)
    release(loaded.model)
    progress.phase("predictions")
    start = prefill(loaded.model, [rows[0].ids[:-1]], context, scored)
    scores = score(rows, start, lambda begun, steps: sessions.elastic(loaded.model, recipes, begun, steps), progress.progress)
    return quality_delta(STOCK, text.name, context, scores), None
