"""How a result came about, whichever program wrote it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from elastickv.html_report.report_data import Provenance
from elastickv.results.kinds.model_result import versions

_LABELS = {"os": "operating system", "cpu": "processor", "threads": "threads", "python": "python", "commit": "commit"}


def provenance(
    source: str,
    device: str,
    environment: Mapping[str, Any],
    warnings: Iterable[str],
    *,
    date: str = "",
    command: Sequence[str] = (),
    **settings: Any,
) -> Provenance:
    """Return how a result came about; what a file does not record is left out.

    Parameters
    ----------
    environment : what the file records of the machine and of versions.
    warnings : everything that limits what the result shows; duplicates are dropped.
    date : when it was measured, where `environment` does not say so.
    **settings : further properties of the machine; underscores in their names become spaces.
    """
    shown = {name.replace("_", " "): value for name, value in settings.items()}
    shown |= {label: environment.get(name) for name, label in _LABELS.items()}
    shown |= {name: environment[name] for name in ("torch", "transformers") if name in environment}
    shown |= {name: version for name, version in versions(environment).items() if version is not None}
    measured = date or environment.get("date_utc") or ""
    return Provenance(
        source=source,
        device=device,
        date=str(measured)[:16].replace("T", " "),
        command=tuple(command),
        environment={name: str(value) for name, value in shown.items() if value is not None},
        warnings=tuple(dict.fromkeys(warnings)),
    )
