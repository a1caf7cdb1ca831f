"""`Measurement`: a result of `bench` or `baseline` with its rows, texts and files."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from elastickv.benchmark.from_dict import to_dict
from elastickv.errors import UsageError
from elastickv.inputs import file_path
from elastickv.results.documents import Document, documents
from elastickv.results.files import SUFFIXES, write_text
from elastickv.results.formats import FORMATS
from elastickv.results.formats.rows import frame
from elastickv.results.load import guarded, kind_of, run_of


class Measurement(Mapping[str, Any]):
    """What `elastickv.bench` measured: a read-only mapping of what the JSON holds, such as `result["speedup"]["low"]`.

    `result` is the same as a dataclass, such as `measurement.result.speedup.low`. Keys that an older file lacks have their
    defaults; keys that this version does not know are left out.

    `print` shows the table of the command line, a notebook a table of its own.
    """

    def __init__(self, result: Mapping[str, Any], source: str = "the result") -> None:
        """Read JSON values.

        Parameters
        ----------
        source : what error messages call the values: their file.

        Raises
        ------
        UsageError : naming the key that is missing, of another type or out of range.
        """
        kind = kind_of(result)
        if kind is None or kind.formats is None or kind.rows is None:
            raise UsageError(f"{source} is no result of `elastickv bench` or `baseline`: give the file that its `output` wrote")
        self.result = kind.type.from_dict(result, source)
        self._rows, self._formats = kind.rows, kind.formats
        self._values: dict[str, Any] = to_dict(self.result)

    @classmethod
    def load(cls, path: Path | str) -> "Measurement":
        """Return the result that a file holds.

        Raises
        ------
        UsageError : naming the file, if it cannot be read or holds anything but one result of `elastickv bench` or `baseline`.
        """
        notes: list[str] = []
        values = list(documents(file_path(path), notes))
        if len(values) != 1 or notes:
            raise UsageError(f"{path} holds {len(values)} values{' and one cut off' * bool(notes)}: give a file of one result")
        return cls.of(values[0])

    @classmethod
    def of(cls, document: Document) -> "Measurement":
        """Return what a document holds as a result.

        Raises
        ------
        UsageError : naming its file, if it is none, is of another schema, or lacks something.
        """
        measurement = cls(document.value, document.source)
        run_of(document)  # too few samples, or times in different units
        for name in FORMATS:
            guarded(document.source, lambda: measurement.shown(name))  # noqa: B023
        return measurement

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"<Measurement: {self.shown('table').splitlines()[0].strip()}>"

    def __str__(self) -> str:
        return self.shown("table")

    @property
    def complete(self) -> bool:
        """Whether everything was measured; False where the run was interrupted."""
        return bool(getattr(self.result, "complete", True))

    @property
    def outcome(self) -> str | None:
        """What the gate says: 'pass', 'fail' or 'inconclusive'; None without one."""
        verdict = getattr(self.result, "verdict", None)
        return str(verdict.outcome) if verdict else None

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return self._values

    def rows(self) -> list[dict[str, Any]]:
        """Return the main figures: one row; of a model one for each cache that was measured. None where nothing was."""
        return self._rows(self.result)

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
        return self._formats[format_](self.result)

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
        write_text(file_path(path), self.shown(SUFFIXES.get(file_path(path).suffix.lower(), "json")))

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
