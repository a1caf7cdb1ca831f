"""What the documents show of long texts (docs/quality.md), pass keys and the time of an evaluation (docs/fidelity.md)."""

import json
from pathlib import Path
from typing import Any

from frontier_figures import measured_with, short_name, table

from elastickv.evaluation.generations.text_figures import ComparedMean, TextFigures
from elastickv.evaluation.metrics import Estimate
from elastickv.results.kinds.evaluation_result import EvaluationResult

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
_TEXT_HEADERS = [
    "texts",
    "cache",
    "repeated 4-grams, %",
    "texts that end in a loop",
    "tokens",
    "leaves full attention at",
    "self-BLEU",
]


def generations() -> list[str]:
    """Return a table of texts for each model: greedy and sampled ones of full attention and of our recipes."""
    lines: list[str] = []
    for model, result in {short_name(result.model.name): result for result in _results("generations-*")}.items():
        rows = result.generations or []
        first = rows[0]
        cells = [
            [decoding, f"`{row.cache}`", *_text_cells(row.of_texts[decoding])] for decoding in first.of_texts for row in rows
        ]
        lines += [
            f"### {model}, at most {first.tokens} tokens",
            "",
            f"{measured_with(result)} After each of {first.windows} windows of {', '.join(result.texts)}: a greedy text, "
            f"{first.samples} samples.",
            "",
            *table(_TEXT_HEADERS, cells),
            "",
        ]
    return lines[:-1]


def _text_cells(figures: TextFigures) -> list[str]:
    return [
        _compared(figures.repetition, 100, 1),
        f"{figures.loops} of {figures.texts}",
        _compared(figures.length, 1, 0),
        "-" if figures.first_different is None else _interval(figures.first_different, 1, 0, ""),
        "-" if figures.self_bleu is None else _compared(figures.self_bleu, 1, 3),
    ]


def _compared(figure: ComparedMean, factor: float, digits: int) -> str:
    """Return full attention's mean, or a cache's mean with its difference to it and the interval of that."""
    mean = f"{factor * figure.mean.mean:.{digits}f}"
    return mean if figure.difference is None else f"{mean} ({_interval(figure.difference, factor, digits, '+')})"


def _interval(figure: Estimate, factor: float, digits: int, sign: str) -> str:
    mean, low, high = (f"{factor * value:{sign}.{digits}f}" for value in (figure.mean, figure.low, figure.high))
    return f"{mean} [{low}, {high}]"


def pass_keys() -> list[str]:
    """Return a table: a row a model and length, how many pass keys each cache answered."""
    measured = {
        (short_name(result.model.name), row.tokens): (result, row)
        for result in _results("fidelity-*-needle")
        for row in result.needle
    }
    caches = list(dict.fromkeys(cache for _, row in measured.values() for cache in row.found))
    cells = []
    for (model, tokens), (_, row) in sorted(measured.items()):
        found = (row.found.get(cache) for cache in caches)
        shown = ("-" if hits is None else f"{sum(hits)}" for hits in found)
        cells.append([model, str(tokens), str(len(row.depths)), *shown])
    sources = dict.fromkeys(f"{measured_with(of)} In {' and '.join(of.texts)}." for of, _ in measured.values())
    return [*table(["model", "tokens", "pass keys", *caches], cells), "", *sources]


def evaluation_time() -> list[str]:
    """Return a table of the seconds that calibration and evaluation with the commands' defaults take, where both ended."""
    cells = []
    for path in sorted(RESULTS.glob("*/evaluation_time-*.json")):
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not record["complete"]:
            continue
        seconds = {phase["phase"]: phase["seconds"] for phase in record["phases"]}
        before, calibration = (
            sum(seconds[name] for name in names) for names in (("starting", "importing", "loading"), ("calibrating",))
        )
        evaluation = record["seconds"] - before - calibration
        device = record.get("device_name", record["device"])
        cells.append(
            [
                short_name(Path(record["model"]).name),
                f"{record['dtype']}, {device}",
                *(f"{s:.0f}" for s in (before, calibration, evaluation)),
            ]
        )
    return table(["model", "on", "start and loading, s", "calibration, s", "evaluation, s"], cells)


def _results(pattern: str) -> list[EvaluationResult]:
    """Return results in the order of their models; those of a GPU follow those of a CPU, and stand for them."""
    paths = sorted(RESULTS.glob(f"*/{pattern}.json"), key=lambda path: (path.parent.name != "cpu", path))
    results = [EvaluationResult.from_dict(json.loads(path.read_text(encoding="utf-8")), path.name) for path in paths]
    return sorted(results, key=lambda result: result.model.name)
