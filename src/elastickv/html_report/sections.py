"""The sections of the page, in order: one function each, one line in `SECTIONS`."""

from collections.abc import Callable

from elastickv.html_report.content import Section
from elastickv.html_report.cost_sections import fidelity, memory, models, needle
from elastickv.html_report.record_sections import commands, environment, warnings
from elastickv.html_report.report_data import ReportData
from elastickv.html_report.speed_sections import latency, results, roofline, speedup, time

SECTIONS: tuple[Callable[[ReportData], Section], ...] = (
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
