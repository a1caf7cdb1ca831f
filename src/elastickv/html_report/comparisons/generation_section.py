"""The section on generated texts: repetition, loops, length and self-BLEU of what each cache generates."""

from collections.abc import Iterator

from elastickv.evaluation.generations.text_figures import ComparedMean
from elastickv.html_report.charts.generation_charts import repetition_chart
from elastickv.html_report.comparisons.generated_texts import GeneratedTexts, generated_texts_of
from elastickv.html_report.content import Section, tables
from elastickv.html_report.report_data import IntervalEstimate, ReportData
from elastickv.results.formats.units import interval


def generations(data: ReportData) -> Section:
    """Return figures of the texts that each cache generates after the same windows."""
    generated = generated_texts_of(data.evaluations)
    return Section(
        "generations",
        "Generated texts",
        "What each cache generates in the same windows: one greedy text each, and sampled ones with the same random numbers "
        "for every cache. Repetition is the share of 4-grams that occurred earlier in the text (seq-rep-4); a loop is a text "
        "whose last quarter repeats itself. Self-BLEU compares a sample with full attention's other samples: full attention's "
        "own is what two of its texts have in common. Differences to full attention are paired by window.",
        charts=[repetition_chart(number, each) for number, each in enumerate(generated, 1)],
        tables=tables(
            "Generated texts, with 95 % intervals over windows",
            (row for each in generated for row in _rows(each)),
            ("model", "cache", "texts", "loops"),
        ),
        missing="a result of elastickv eval with --generate",
    )


def _rows(generated: GeneratedTexts) -> Iterator[dict[str, str]]:
    for row in generated.rows:
        for kind, figures in row.of_texts.items():
            leaves = figures.first_different
            yield {
                "model": generated.model,
                "context": str(generated.context),
                "cache": row.cache,
                "texts": kind,
                "repetition, %": _mean(figures.repetition, row.windows, 100, 1),
                "repetition to full, %": _difference(figures.repetition, row.windows, 100, 1),
                "loops": f"{figures.loops} of {figures.texts}",
                "tokens": _mean(figures.length, row.windows, 1, 0),
                "tokens to full": _difference(figures.length, row.windows, 1, 0),
                "self-BLEU, %": _mean(figures.self_bleu, row.windows, 100, 1),
                "self-BLEU to full, %": _difference(figures.self_bleu, row.windows, 100, 1),
                "leaves full at": "" if leaves is None else interval(IntervalEstimate.over(leaves, row.windows), 0),
            }


def _mean(figure: ComparedMean | None, windows: int, scale: float, digits: int) -> str:
    return "" if figure is None else interval(IntervalEstimate.over(figure.mean, windows, scale), digits)


def _difference(figure: ComparedMean | None, windows: int, scale: float, digits: int) -> str:
    if figure is None or figure.difference is None:
        return ""
    return interval(IntervalEstimate.over(figure.difference, windows, scale), digits)
