"""Figures of the texts that a cache generates: repetition, length, self-BLEU, and where they leave full attention's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import numpy as np

from elastickv.benchmark.from_dict import SIGNED
from elastickv.evaluation.generations.bleu import bleu
from elastickv.evaluation.generations.repetition import ends_in_loop, repetition_rate
from elastickv.evaluation.metrics import Estimate, estimate

Texts: TypeAlias = Sequence[Sequence[Sequence[int]]]
"""(windows, texts of a window): token ids."""


@dataclass(frozen=True)
class ComparedMean:
    """A mean over windows, and the mean of the windows' differences to full attention; None of full attention itself."""

    mean: Estimate
    difference: Annotated[Estimate, SIGNED] | None = None


@dataclass(frozen=True)
class TextFigures:
    """Figures of the texts that one cache generates, of the same number after each window.

    Attributes
    ----------
    repetition : repetition rate of a text, seq-rep-4.
    length : tokens up to the end of the text.
    self_bleu : BLEU of a sampled text against the other samples of full attention after the same window; None where there are
        fewer than two.
    first_different : the number of the first token that differs from full attention's text with the same random numbers, the
        tokens that were asked for if none does; None of full attention itself.
    texts : number of texts.
    loops : texts of which the last quarter repeats itself.
    repetition_rates : of each text, a list a window.
    """

    repetition: ComparedMean
    length: ComparedMean
    self_bleu: ComparedMean | None
    first_different: Estimate | None
    texts: int
    loops: int
    repetition_rates: list[list[float]]


def text_figures(texts: Texts, full: Texts, tokens: int) -> TextFigures:
    """Compare texts with those of full attention, with 95 % bootstrap intervals over windows.

    Parameters
    ----------
    texts, full : of a cache and of full attention, as many; the same object for full attention itself.
    tokens : asked for.
    """
    rates = [[repetition_rate(text) for text in window] for window in texts]
    several = min(len(window) for window in full) > 1
    own = texts is full
    return TextFigures(
        repetition=_compared(texts, full, lambda window, _: [repetition_rate(text) for text in window]),
        length=_compared(texts, full, lambda window, _: [len(text) for text in window]),
        self_bleu=_compared(texts, full, _self_bleu) if several else None,
        first_different=None if own else estimate(_means(texts, full, lambda a, b: _first_different(a, b, tokens))),
        texts=sum(len(window) for window in texts),
        loops=sum(ends_in_loop(text) for window in texts for text in window),
        repetition_rates=rates,
    )


_OfWindow = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], Sequence[float]]


def _compared(texts: Texts, full: Texts, figure: _OfWindow) -> ComparedMean:
    own = _means(texts, full, figure)
    return ComparedMean(estimate(own), None if texts is full else estimate(own - _means(full, full, figure)))


def _means(texts: Texts, full: Texts, figure: _OfWindow) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array([np.mean(figure(window, reference)) for window, reference in zip(texts, full, strict=True)])


def _self_bleu(window: Sequence[Sequence[int]], full: Sequence[Sequence[int]]) -> list[float]:
    """Return each sample's BLEU against full attention's other samples: those with other random numbers (Zhu et al. 2018)."""
    return [bleu(text, [*full[:number], *full[number + 1 :]]) for number, text in enumerate(window)]


def _first_different(window: Sequence[Sequence[int]], full: Sequence[Sequence[int]], tokens: int) -> list[int]:
    return [_parts_at(text, reference, tokens) for text, reference in zip(window, full, strict=True)]


def _parts_at(text: Sequence[int], reference: Sequence[int], tokens: int) -> int:
    """Return the number of the first token that differs: one text may end where the other goes on."""
    if list(text) == list(reference):
        return tokens
    pairs = enumerate(zip(text, reference, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(text), len(reference)))
