"""What the page shows of vLLM with each kind of KV cache."""

from collections.abc import Iterator
from typing import Any

from elastickv.html_report.provenance import provenance
from elastickv.html_report.report_data import Serving
from elastickv.results.kinds.serving_result import ServingResult, ServingStep


def serving_view(result: ServingResult, source: str) -> Serving:
    """Return a result with how it came about."""
    device = result.device
    settings: dict[str, Any] = {"vllm": device.vllm, "torch_of_vllm": device.torch, "driver": device.driver}
    name = device.device or str(result.environment.get("cpu") or "an unknown device")
    warnings = [*_warnings(result), *(f"not measured: {line}" for line in result.dropped)]
    return Serving(provenance(source, name, result.environment, warnings, command=result.command, **settings), result)


def _warnings(result: ServingResult) -> Iterator[str]:
    for contender in result.contenders:
        yield from (f"{contender.contender}, {line}" for line in contender.failures)


def fastest_step(result: ServingResult) -> tuple[str, ServingStep] | None:
    """Return the contender and the step whose time is the smallest share of the baseline's; None where none has a ratio."""
    steps = [(one.contender, step) for one in result.contenders for step in one.steps if step.of_baseline]
    return min(steps, key=lambda pair: pair[1].of_baseline.estimate if pair[1].of_baseline else 0, default=None)
