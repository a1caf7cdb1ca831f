"""Tables of vLLM's soak: what was asked of it, and what each backend did."""

from collections.abc import Iterator, Mapping
from typing import Any

from elastickv.html_report.content import Table, tables
from elastickv.html_report.provenance import provenance
from elastickv.html_report.report_data import ReportData, Soak
from elastickv.results.formats.units import fixed
from elastickv.results.kinds.soak_result import SoakResult

_TEXT = ("asked", "holds", "figures", "backend", "result")
_HOLDS = {True: "yes", False: "no", None: "not measured"}


def soak_view(result: SoakResult, source: str) -> Soak:
    """Return a result with how it came about."""
    failed = [f"{name}: {record['failed']}" for name, record in result.backends.items() if record.get("failed")]
    device = result.device or str(result.environment.get("cpu") or "an unknown device")
    came = provenance(
        source, device, result.environment, failed, date=result.date_utc, command=result.command, driver=result.driver
    )
    return Soak(came, result)


def soak_tables(data: ReportData) -> list[Table]:
    """Return what was asked and whether it holds, and each backend's load, steps and divergence."""
    return [
        *tables("Under a random load: what is asked", _verdicts(data), _TEXT),
        *tables("Under a random load: what each backend did", _backends(data), _TEXT),
    ]


def _verdicts(data: ReportData) -> Iterator[dict[str, str]]:
    for soak in data.soaks:
        for verdict in soak.result.verdicts:
            figures = verdict.figures
            shown = ", ".join(f"{name} {_short(value)}" for name, value in figures.items()) if isinstance(figures, dict) else ""
            shown = shown or (_short(figures) if isinstance(figures, (int, float)) else "")
            yield {
                "asked": verdict.what,
                "holds": _HOLDS[verdict.holds],
                "figures": shown,
                "result": data.names[soak.provenance.source],
            }


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _backends(data: ReportData) -> Iterator[dict[str, str]]:
    for soak in data.soaks:
        for backend, record in soak.result.backends.items():
            counts, decode = _inner(record, "counts"), _inner(record, "times", "decode")
            yield {
                "backend": backend,
                "steps": str(record.get("steps") or ""),
                **{name.replace("_", " "): str(counts.get(name, "")) for name in ("requests", "aborted", "preemptions")},
                "prefix hits": str(counts.get("prefix_hits", "")),
                "decode step, ms": fixed(decode.get("median_ms"), 2),
                "p99.9 / median": fixed(decode.get("p999_over_median"), 2),
                **{f"KL, {name}": _divergence(record, name) for name in ("soak", "chunks", "alone")},
                "result": data.names[soak.provenance.source],
            }


def _divergence(record: Mapping[str, Any], name: str) -> str:
    divergence = _inner(record, "agreement", "all", name)
    return f"{divergence['kl']:.2e}" if "kl" in divergence else ""


def _inner(record: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    for name in names:
        inner = record.get(name)
        record = inner if isinstance(inner, Mapping) else {}
    return record
