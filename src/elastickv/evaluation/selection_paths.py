"""Decoding with published selections, each at every budget of the evaluation."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from elastickv.errors import UsageError
from elastickv.evaluation import sessions
from elastickv.evaluation.kv_selections.prompt_observation import prompt_scores
from elastickv.evaluation.kv_selections.published_selections import selection_of
from elastickv.evaluation.kv_selections.reference_selection import (
    PromptScoredSelection,
    SelectionPlan,
    plan_selection,
    token_bytes,
)
from elastickv.evaluation.prefill import Prefill, Tensor
from elastickv.evaluation.recipes_by_ratio import Span
from elastickv.evaluation.subject import DecodePath, Subject


def selection_paths(
    subject: Subject, names: Sequence[str], ratios: Sequence[float], span: Span
) -> tuple[list[DecodePath], list[str]]:
    """Return a path for each selection and ratio above 1, and the reasons why some have none.

    Parameters
    ----------
    names : as `parse_selections` returns them.
    span : the decode steps over which a selection must meet its ratio; stored bytes are those at its end.

    Raises
    ------
    UsageError : if there are selections and no ratio is above 1, or one cannot run with the model.
    """
    budgets = [ratio for ratio in ratios if ratio > 1]
    if names and not budgets:
        raise UsageError("`selections` need a budget: give values of C above 1 in `compress`")
    paths, reasons = [], []
    for name in names:
        selection = selection_of(name)
        selection.prepare(subject.model)
        scored = _PromptScores(subject.model)
        for ratio in budgets:
            try:
                chosen = plan_selection(selection, ratio, span, subject.layers, subject.head_dim)
            except UsageError as error:
                reasons.append(str(error))
                continue
            figures = _figures(subject, chosen, span)
            paths.append(DecodePath(f"{name} C={ratio:g}", _SelectedDecoding(subject.model, chosen, scored), figures))
    return paths, reasons


class _PromptScores:
    """Scores of the latest prefill, which all budgets share unless a selection scores for its size.

    Whichever copies of the prefill's rows are decoded, each row is scored once.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._of: tuple[Prefill, int | None] | None = None
        self._scores: dict[int, Tensor] = {}

    def __call__(self, start: Prefill, chosen: SelectionPlan) -> dict[int, Tensor]:
        """Return layer -> (rows, kv_heads, tokens) scores; empty where a selection needs none."""
        selection, size = chosen.selection, chosen.size
        if not isinstance(selection, PromptScoredSelection):
            return {}
        of = (start, size if selection.scores_for_size else None)
        if self._of is None or self._of[0].keys is not start.keys or self._of[1] != of[1]:
            self._scores = prompt_scores(self._model, start, lambda prompt: selection.prompt_scores(size, prompt))
            self._of = of
        return {number: rows.repeat_interleave(start.copies, dim=0) for number, rows in self._scores.items()}


class _SelectedDecoding:
    """Opens sessions."""

    def __init__(self, model: Any, chosen: SelectionPlan, scored: _PromptScores) -> None:
        self._model, self._chosen, self._scored = model, chosen, scored

    def __call__(self, start: Prefill, tokens: int) -> AbstractContextManager[sessions.DecodingSession]:
        return sessions.selected(self._model, self._chosen, self._scored(start, self._chosen), start)


def _figures(subject: Subject, chosen: SelectionPlan, span: Span) -> dict[str, Any]:
    heads, end = subject.shape.kv_heads, span.first + span.steps
    selection = chosen.selection
    stored_dense = subject.layers * end * token_bytes(subject.head_dim)
    return {
        "compress": None,
        "read_ratio": chosen.dense_bytes / chosen.bytes_read,
        "stored_ratio": stored_dense / chosen.bytes_stored,
        "step_bytes_read": heads * chosen.bytes_read / span.steps,
        "bytes_stored": heads * chosen.bytes_stored,
        "selection": {
            "method": selection.name,
            "compress": chosen.compress,
            "size": chosen.size,
            "unit": selection.unit,
            "dense_layers": chosen.dense_layers,
            "source": selection.source,
        },
    }
