"""The result of an evaluation while it grows."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from elastickv.benchmark.environment import environment
from elastickv.evaluation.evaluation_inputs import EvaluationInputs
from elastickv.evaluation.evaluation_options import EvaluationOptions
from elastickv.evaluation.metrics import Fidelity
from elastickv.evaluation.records.scored_windows import window_records
from elastickv.evaluation.suggestion import suggest
from elastickv.evaluation.texts import Text
from elastickv.recipe import ModelCalibration

KIND = "elastickv-fidelity"
VERSION = 1


class EvaluationRecord:
    """What is measured, and what was measured so far.

    Parameters
    ----------
    packages : names of packages whose versions the environment has too.
    model : as `EvaluatedModel` has it.
    skipped : reasons why something is not measured; they may be extended.

    Attributes
    ----------
    rows, generations, needle, tasks : finished rows, to be extended.
    model : as given; it may be extended.
    engine : what serves, as `EvaluationEngine` has it; None: Transformers.
    """

    def __init__(
        self,
        packages: tuple[str, ...],
        model: dict[str, Any],
        texts: Sequence[Text],
        tokenizer: Any,
        inputs: EvaluationInputs,
        options: EvaluationOptions,
        calibration: ModelCalibration | None,
        skipped: list[str],
    ) -> None:
        self.rows: list[dict[str, Any]] = []
        self.generations: list[dict[str, Any]] = []
        self.needle: list[dict[str, Any]] = []
        self.tasks: list[dict[str, Any]] = []
        self.model, self.engine = model, dict[str, Any]()
        self._started, self._options = time.monotonic(), options
        self._environment = environment() | {name: _version(name) for name in packages}
        self._windows = window_records(texts, tokenizer, inputs.windows, options.scored, inputs.haystacks)
        self._calibration = None if calibration is None else {"text": calibration.text, "tokens": calibration.tokens}
        self.skipped = skipped

    @property
    def empty(self) -> bool:
        """Whether no row is finished."""
        return not (self.rows or self.needle or self.tasks)

    def as_dict(self, complete: bool) -> dict[str, Any]:
        """Return the result as JSON values; a suggestion is made of a complete one only."""
        options, of_tasks = self._options, self._options.tasks or self._options.datasets
        suggested = options.tolerance is not None and complete
        return {
            "kind": KIND,
            "version": VERSION,
            "complete": complete,
            "environment": self._environment,
            "model": self.model,
            **({"engine": self.engine} if self.engine else {}),
            **self._windows,
            "calibration": self._calibration,
            "options": {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(options).items()},
            "skipped": self.skipped,
            "rows": self.rows,
            "generations": self.generations,
            "needle": self.needle,
            **({"tasks": self.tasks} if of_tasks else {}),
            "suggestion": suggest(self.rows, options.tolerance) if suggested and options.tolerance is not None else None,
            "seconds": time.monotonic() - self._started,
        }


def loss_row(
    context: int, name: str, figures: dict[str, Any], losses: Fidelity, windows: int, scored: int, began: float
) -> dict[str, Any]:
    """Return the row of a cache at one context.

    Parameters
    ----------
    name : of the cache.
    figures : what the row says of recipes, formats and bytes.
    scored : tokens of each window.
    began : reading of `time.monotonic` at the row's beginning.
    """
    row = {"context": context, "cache": name} | figures | asdict(losses)
    return row | {"windows": windows, "scored_tokens": windows * scored, "seconds": time.monotonic() - began}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
