"""Results of `benchmarks/serving_soak.py`: vLLM under a random load."""

from dataclasses import dataclass
from typing import Any

from elastickv.benchmark.from_dict import from_dict
from elastickv.results.kinds.model_result import check_version

SOAK_KIND = "elastickv-serving-soak"
SOAK_VERSION = 1


@dataclass(frozen=True)
class SoakVerdict:
    """What was asked of a soak, whether it holds (None: it was not measured), and the figures that it was judged by."""

    what: str
    holds: bool | None
    figures: Any


@dataclass(frozen=True)
class SoakResult:
    """Backends of vLLM under the same random load, and what was asked of them.

    `backends` are the records of their processes by name, as `benchmarks/soak_engine.py` wrote them; `device` and `driver` are
    null where no engine started.
    """

    kind: str
    version: int
    date_utc: str
    command: list[str]
    settings: dict[str, Any]
    environment: dict[str, Any]
    device: str | None
    driver: str | None
    backends: dict[str, dict[str, Any]]
    verdicts: list[SoakVerdict]

    @classmethod
    def from_dict(cls, value: Any, source: str = "the result") -> "SoakResult":
        """Return these JSON values as a result.

        Raises
        ------
        UsageError : naming the key that is missing, of another type or out of range, or another version.
        """
        check_version(value, SOAK_VERSION, source)
        return from_dict(cls, value, source)
