"""A result of `bench` or `baseline` as a value: figures, rows, files, a table in a notebook."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastickv.errors import UsageError
from elastickv.results.documents import Document, documents
from elastickv.results.files import SUFFIXES, write_text
from elastickv.results.formats import FORMATS, baseline_table, generation_table
from elastickv.results.formats.rows import frame, row
from elastickv.results.readers import run_of


@dataclass(frozen=True)
class _Kind:
    """What tells one kind of result apart, its rows, and the texts it is shown as."""

    holds: Callable[[Mapping[str, Any]], bool]
    rows: Callable[[dict[str, Any]], list[dict[str, Any]]]
    formats: dict[str, Callable[[dict[str, Any]], str]]


_KINDS = (
    _Kind(lambda result: "benchmark_type" in result and "schema_version" in result, lambda result: [row(result)], FORMATS),
    _Kind(
        lambda result: result.get("kind") == "elastickv-model-bench" and "fidelity" in result,
        generation_table.rows,
        baseline_table.TRANSFORMERS_FORMATS,
    ),
    _Kind(lambda result: result.get("kind") == "elastickv-model-bench", generation_table.rows, generation_table.FORMATS),
    _Kind(
        lambda result: result.get("kind") == "elastickv-gguf-baseline", baseline_table.gguf_rows, baseline_table.GGUF_FORMATS
    ),
)


class Measurement(Mapping[str, Any]):
    """What `elastickv.bench` measured: a read-only mapping of what the JSON holds, such as `result["speedup"]["low"]`.

    `print` shows the table of the command line, a notebook a table of its own.
    """

    def __init__(self, result: dict[str, Any]) -> None:
        self._result = result
        self._kind = next(kind for kind in _KINDS if kind.holds(result))

    @classmethod
    def load(cls, path: Path | str) -> "Measurement":
        """Return the result that a file holds.

        Raises
        ------
        UsageError : naming the file, if it cannot be read or holds anything but one result of `elastickv bench` or `baseline`.
        """
        notes: list[str] = []
        found = list(documents(Path(path), notes))
        if len(found) != 1 or notes:
            raise UsageError(f"{path} holds {len(found)} values{' and one cut off' * bool(notes)}: give a file of one result")
        return cls.of(found[0])

    @classmethod
    def of(cls, document: Document) -> "Measurement":
        """Return what a document holds as a result.

        Raises
        ------
        UsageError : naming its file, if it is none, is of another schema, or lacks something.
        """
        if run_of(document) is None or not any(kind.holds(document.value) for kind in _KINDS):
            raise UsageError(
                f"{document.source} is no result of `elastickv bench` or `baseline`: give the file that its `output` wrote"
            )
        found = cls(document.value)
        try:
            for name in FORMATS:
                found.shown(name)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            raise UsageError(
                f"{document.source} lacks figures: cut off, edited or not of this program; measure again"
            ) from None
        return found

    def __getitem__(self, name: str) -> Any:
        return self._result[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._result)

    def __len__(self) -> int:
        return len(self._result)

    def __repr__(self) -> str:
        return f"<Measurement: {self.shown('table').splitlines()[0].strip()}>"

    def __str__(self) -> str:
        return self.shown("table")

    @property
    def complete(self) -> bool:
        """Whether everything that was asked for was measured; False where it was interrupted."""
        return bool(self._result.get("complete", True))

    @property
    def outcome(self) -> str | None:
        """What the gate says: 'pass', 'fail' or 'inconclusive'; None without one."""
        verdict = self._result.get("verdict")
        return str(verdict["outcome"]) if verdict else None

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return self._result

    def rows(self) -> list[dict[str, Any]]:
        """Return the main figures: one row; of a model one for each cache that was measured. None where nothing was."""
        return self._kind.rows(self._result)

    def shown(self, format_: str) -> str:
        """Return the result as text.

        Parameters
        ----------
        format_ : 'table', 'json', 'jsonl', 'csv', 'md' or 'html'.

        Raises
        ------
        UsageError : if it is another.
        """
        check_format(format_)
        return self._kind.formats[format_](self._result)

    def to_json(self) -> str:
        """Return the whole result, raw samples among it, as indented JSON."""
        return self.shown("json")

    def to_csv(self) -> str:
        """Return the rows as CSV."""
        return self.shown("csv")

    def to_markdown(self) -> str:
        """Return the rows as a Markdown table."""
        return self.shown("md")

    def to_pandas(self) -> Any:
        """Return the rows as a `pandas.DataFrame`.

        Raises
        ------
        UsageError : if pandas is not installed.
        """
        return frame(self.rows())

    def save(self, path: Path | str) -> None:
        """Write the result; the suffix names the format: .json, .jsonl, .csv, .md, .html or .txt, anything else is JSON.

        Raises
        ------
        UsageError : if it cannot be written.
        """
        write_text(Path(path), self.shown(SUFFIXES.get(Path(path).suffix.lower(), "json")))

    def _repr_html_(self) -> str:
        return self.shown("html")


def check_format(format_: str) -> None:
    """Refuse a format that a result has no form in.

    Raises
    ------
    UsageError : if it is none of `FORMATS`.
    """
    if format_ not in FORMATS:
        raise UsageError(f"`format` {format_} is unknown: choose {', '.join(FORMATS)}")
