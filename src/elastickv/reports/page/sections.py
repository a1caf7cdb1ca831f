"""The sections of the page, in order: one function each, one line in `SECTIONS`."""

from collections.abc import Callable

from elastickv.reports.page.content import Section, Table
from elastickv.reports.page.facts import Facts, Step
from elastickv.reports.page.speed_charts import roofline_charts, speedup_chart, time_charts
from elastickv.reports.units import duration, fixed, interval

_BENCH = "a result of `elastickv bench`, or a sweep"


def _speedup(facts: Facts) -> Section:
    chart = speedup_chart(facts.steps)
    return Section(
        "speedup",
        "Speed-up against C",
        "C is what a step saves: dense bytes / bytes read. On the dashed line C = ideal a recipe that reads 1/C of the "
        "bytes takes 1/C of the time. Dense is the fastest contender of the same run; bars are 95 % intervals.",
        charts=[chart] if chart else [],
        missing=_BENCH,
    )


def _roofline(facts: Facts) -> Section:
    return Section(
        "roofline",
        "Roofline",
        "Left of the ridge memory bandwidth is the limit, right of it arithmetic. Both ceilings were measured on the device "
        "that is named, in the same runs (the median of them is drawn).",
        charts=list(roofline_charts(facts.steps)),
        missing=_BENCH,
    )


def _time(facts: Facts) -> Section:
    charts, left = time_charts(facts.steps)
    return Section(
        "time",
        "Time per step against context",
        "One decode step of one layer; both axes are logarithmic. Of each package of peers the fastest variant is drawn. Where "
        "several results measured the same, the median is drawn, and the bar reaches over the intervals of all of them.",
        charts=charts,
        notes=[f"not drawn, but in the table of all results: {', '.join(left)}"] if left else (),
        missing=_BENCH,
    )


def _results(facts: Facts) -> Section:
    headers = (
        "result", "context", "shape", "recipe", "read 1/", "stored 1/", "dense", "elastic", "speed-up", "cycle",
        "recipe error", "p95", "A/A",
    )  # fmt: skip
    rows = [
        (
            facts.names[step.told.source],
            str(step.context),
            step.shape,
            step.what,
            fixed(step.read, 2),
            fixed(step.stored, 2),
            f"{duration(step.dense_ms)} {step.baseline or ''}".strip(),
            duration(step.elastic_ms),
            interval(step.speedup, 3, "×") + _doubt(step),
            interval(step.cycle, 3, "×"),
            fixed(step.error.mean if step.error else None, 4),
            fixed(step.error.p95 if step.error else None, 4),
            interval(step.noise_floor),
        )
        for step in facts.steps
    ]
    table = Table("Decode steps of one layer, with 95 % intervals", headers, rows, (*headers[4:6], *headers[7:]))
    return Section(
        "results",
        "All results",
        "Speed-up: dense time / elastic time in turns. Cycle: the same of whole decoded tokens, appending and selecting "
        "included. Recipe error: relative L2 against dense attention on real activations. A/A: dense against itself.",
        tables=[table] if rows else [],
        missing=_BENCH,
    )


def _doubt(step: Step) -> str:
    return " (within noise)" if step.faster is False and step.speedup and step.speedup.estimate >= 1 else ""


SECTIONS: tuple[Callable[[Facts], Section], ...] = (_speedup, _roofline, _time, _results)
