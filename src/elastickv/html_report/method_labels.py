"""How results were measured, in labels: what was measured in another way is never averaged, and says so."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastickv.html_report.report_data import IntervalEstimate, Step

# Of these no line of a chart joins two, even at different contexts.
_ALWAYS_APART = ("program", "pairing", "CUDA graphs")
_WORDS = {
    ("pairing", "abba"): "paired",
    ("pairing", "sequential"): "not paired",
    ("CUDA graphs", "True"): "CUDA graphs",
    ("CUDA graphs", "False"): "no CUDA graphs",
}


@dataclass(frozen=True)
class MeasuredTime:
    """A time at one context, and how it was measured; `variant` is what exactly ran: a recipe, a dense contender."""

    context: int
    time: IntervalEstimate
    method: Mapping[str, Any]
    variant: str


def labeled_series(label: str, times: Sequence[MeasuredTime]) -> dict[str, dict[int, list[IntervalEstimate]]]:
    """Return the times of a series by label and context: one label, or one for each way of measuring.

    Only times of one label and context may be averaged: they share the device, the shape, the method and what ran.
    """
    apart = [name for name in _ALWAYS_APART if _differ([timing.method.get(name) for timing in times])]
    together: dict[tuple[int, str], list[MeasuredTime]] = {}
    for timing in times:
        together.setdefault((timing.context, method_label(timing.method, apart)), []).append(timing)
    groups = list(together.values())
    names = dict.fromkeys(name for group in groups for timing in group for name in timing.method)
    apart += [name for name in names if any(_differ([timing.method.get(name) for timing in group]) for group in groups)]
    several = any(_differ([timing.variant for timing in group]) for group in groups)
    series: dict[str, dict[int, list[IntervalEstimate]]] = {}
    for timing in times:
        parts = [*([timing.variant] if several else ()), *filter(None, [method_label(timing.method, apart)])]
        own = f"{label} ({', '.join(parts)})" if parts else label
        series.setdefault(own, {}).setdefault(timing.context, []).append(timing.time)
    return series


def step_label(step: Step, steps: Sequence[Step]) -> str:
    """Return how a step was measured, as far as others were measured in another way."""
    return method_label(step.method, [name for name in _ALWAYS_APART if _differ([one.method.get(name) for one in steps])])


def method_label(method: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return these parts of a method in words."""
    said = ((name, str(method[name])) for name in dict.fromkeys(names) if name in method)
    return ", ".join(_WORDS.get(part, part[1] if part[0] == "program" else f"{part[0]} {part[1]}") for part in said)


def _differ(values: Sequence[Any]) -> bool:
    return len(set(map(str, values))) > 1
