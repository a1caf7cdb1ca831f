"""What an input did that it must not: told apart by the error and the line it came from, each kept once."""

import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.targets import Target

PATIENCE_S = 5.0


@dataclass
class Findings:
    """Runs a target on inputs and keeps one of each kind that fails.

    Attributes
    ----------
    found : what happened -> the shortest input that did it.
    runs, refused : inputs tried, and those that the parser refused as documented.
    slowest_s : longest processor time that one input took; waiting is the fuzzer's own limit to see.
    """

    target: Target
    found: dict[str, bytes] = field(default_factory=dict)
    runs: int = 0
    refused: int = 0
    slowest_s: float = 0.0

    def run(self, data: bytes) -> bool:
        """Try one input; return whether something new was found."""
        start, kind = time.process_time(), None
        try:
            self.target.one(data)
        except self.target.documented as error:
            self.refused += 1
            if "\n" in str(error).strip():
                kind = f"a message of several lines: {str(error)[:80]!r}"
        except Exception as error:
            where = next(f for f in reversed(traceback.extract_tb(error.__traceback__)) if "/lib/python" not in f.filename)
            kind = f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}: {str(error)[:120]}"
            kind = kind.split(": ")[0] if not isinstance(error, AssertionError) else kind
        took = time.process_time() - start
        self.slowest_s = max(self.slowest_s, took)
        self.runs += 1
        if took > PATIENCE_S and kind is None and self.runs > 1:
            kind = "slower than a few seconds"
        if kind is None:
            return False
        new = kind not in self.found
        if new or len(data) < len(self.found[kind]):
            self.found[kind] = data
        return new


def quiet() -> None:
    """Warnings are no findings; and an overflow that NumPy warns of shows in the figures."""
    warnings.simplefilter("ignore")
