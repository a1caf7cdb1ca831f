"""The sections of the page, in order: one function each, one line in `SECTIONS`."""

import re
from collections.abc import Callable

from elastickv.html_report.comparisons.frontier_section import frontier
from elastickv.html_report.comparisons.generation_section import generations
from elastickv.html_report.comparisons.task_section import tasks
from elastickv.html_report.content import Content, Section
from elastickv.html_report.cost_sections import fidelity, memory, models, needle
from elastickv.html_report.headline import headline_of
from elastickv.html_report.record_sections import commands, environment, warnings
from elastickv.html_report.report_data import ReportData
from elastickv.html_report.serving_section import serving
from elastickv.html_report.speed_sections import latency, results, roofline, speedup, time

_FEW = 2  # devices
SECTIONS: tuple[Callable[[ReportData], Section], ...] = (
    speedup,
    roofline,
    time,
    fidelity,
    frontier,
    generations,
    needle,
    tasks,
    models,
    serving,
    latency,
    memory,
    results,
    warnings,
    environment,
    commands,
)


def content_of(data: ReportData, title: str | None) -> Content:
    """Return the page of some results."""
    sections = [make(data) for make in SECTIONS]
    return Content(
        title=title or _title(data),
        headline=headline_of(data),
        sections=[section for section in sections if not section.empty],
        absent=[section for section in sections if section.empty],
    )


def _title(data: ReportData) -> str:
    # Some results name a processor with its threads, others without.
    if not data.provenance:
        return "ElasticKV: no cell was measured"
    devices = list(dict.fromkeys(re.sub(r" \(\d+ threads\)$", "", provenance.device) for provenance in data.provenance))
    return f"ElasticKV on {' and '.join(devices) if len(devices) <= _FEW else f'{len(devices)} devices'}"
