"""Figures of generated texts as cells of a table."""

from collections.abc import Iterator, Sequence

from elastickv.evaluation.generations.repetition import LENGTH
from elastickv.evaluation.generations.text_figures import ComparedMean
from elastickv.evaluation.metrics import Estimate
from elastickv.results.kinds.evaluation_result import GenerationRow

TEXT_HEADERS = (
    "context", "cache", "texts", "repetition %", "to full", "loops", "length", "to full", "self-BLEU %", "to full", "leaves at",
)  # fmt: skip


def generated_texts(rows: Sequence[GenerationRow]) -> list[list[str]]:
    """Return a row of cells for each cache and way to decode."""
    return [cells for row in rows for cells in _cells(row)]


def described(rows: Sequence[GenerationRow]) -> str:
    """Return what the columns are, in a line."""
    return (
        f"Texts of at most {max(row.tokens for row in rows)} tokens. Repetition: {LENGTH}-grams that occurred earlier in the "
        "text; loops: texts whose last quarter repeats itself; self-BLEU: against full attention's other samples. `to full` is "
        "the difference to full attention, paired by window."
    )


def _cells(row: GenerationRow) -> Iterator[list[str]]:
    for how, figures in row.of_texts.items():
        alone, leaves = row.windows == 1, figures.first_different
        yield [
            str(row.context),
            row.cache,
            how,
            *_compared(figures.repetition, 100, 1, alone),
            f"{figures.loops} of {figures.texts}",
            *_compared(figures.length, 1, 0, alone),
            *_compared(figures.self_bleu, 100, 1, alone),
            "" if leaves is None else _shown(leaves, 1, 0, "", alone),
        ]


def _compared(figure: ComparedMean | None, scale: float, digits: int, alone: bool) -> tuple[str, str]:
    if figure is None:
        return "", ""
    difference = "" if figure.difference is None else _shown(figure.difference, scale, digits, "+", alone)
    return _shown(figure.mean, scale, digits, "", alone), difference


def _shown(figure: Estimate, scale: float, digits: int, sign: str, alone: bool) -> str:
    """Return a mean with its interval, which the figure of a single window lacks."""
    mean = f"{scale * figure.mean:{sign}.{digits}f}"
    return mean if alone else f"{mean} [{scale * figure.low:.{digits}f}, {scale * figure.high:.{digits}f}]"
