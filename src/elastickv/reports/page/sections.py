"""The sections of the page, in order: one function each, one line in `SECTIONS`."""

from collections.abc import Callable

from elastickv.reports.page.content import Section
from elastickv.reports.page.cost_sections import fidelity, memory, models, needle
from elastickv.reports.page.facts import Facts
from elastickv.reports.page.record_sections import commands, environment, warnings
from elastickv.reports.page.speed_sections import latency, results, roofline, speedup, time

SECTIONS: tuple[Callable[[Facts], Section], ...] = (
    speedup,
    roofline,
    time,
    fidelity,
    needle,
    models,
    latency,
    memory,
    results,
    warnings,
    environment,
    commands,
)
