"""Texts to score and to calibrate on: those of the package, or a user's files, cut into windows of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastickv import inputs
from elastickv.errors import UsageError
from elastickv.transformers.tokenization import text_prefix, text_tokens

SHIPPED = Path(__file__).parent / "data"
EVALUATION = ("morris.txt", "macdowell.txt")
CALIBRATION = "calibration.txt"


@dataclass(frozen=True)
class Text:
    """A text by name."""

    name: str
    content: str


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of one text, after the special tokens that the tokenizer puts before a text.

    Attributes
    ----------
    text : the text's name.
    first : number of the window's first token of the text in that text.
    ids : the tokens, special ones included.
    prefix : number of special tokens at the beginning.
    number : of the text among those that windows were cut from.
    """

    text: str
    first: int
    ids: tuple[int, ...]
    prefix: int = 0
    number: int = 0

    @property
    def end(self) -> int:
        """Number of the text's token after the last one of the window."""
        return self.first + len(self.ids) - self.prefix


def evaluation_texts() -> list[Text]:
    """Return the texts that the package ships to be scored."""
    return [read_text(SHIPPED / name) for name in EVALUATION]


def calibration_text() -> Text:
    """Return the text that the package ships to calibrate on: no part of it is in `evaluation_texts`."""
    return read_text(SHIPPED / CALIBRATION)


def read_text(path: Path) -> Text:
    """Read a UTF-8 text.

    Raises
    ------
    UsageError : if it cannot be read, is no text, or is empty.
    """
    content = inputs.read_text(path, f"text {path}", "give a text file in UTF-8, or an excerpt of it")
    if not content.strip():
        raise UsageError(f"text {path} is empty: give a text of a few thousand words")
    return Text(path.name, content)


def windows(texts: Sequence[Text], tokenizer: Any, tokens: int, count: int) -> list[Window]:
    """Return `count` windows of `tokens` tokens, divided among the texts as evenly as these hold them.

    Every window begins with the special tokens that the tokenizer puts before a text, which count as tokens of the window. No
    two windows share a token of a text, and no two hold the same tokens.

    Raises
    ------
    UsageError : if a text is shorter than a window, the texts do not hold so many windows, or windows would be copies.
    """
    prefix = text_prefix(tokenizer)
    own = tokens - len(prefix)
    if own < 1:
        raise UsageError(f"windows of {tokens} tokens hold no text after {len(prefix)} special tokens: give longer ones")
    used = texts[:count]
    ids = [text_tokens(tokenizer, text.content) for text in used]
    for text, held in zip(used, ids, strict=True):
        if len(held) < own:
            raise UsageError(
                f"text {text.name} has {len(held)} tokens and a window needs {own}: give a longer text or a shorter `context`"
            )
    most = [len(held) // own for held in ids]
    if count > sum(most):
        rooms = ", ".join(f"{text.name} {room}" for text, room in zip(used, most, strict=True))
        raise UsageError(
            f"{count} windows of {tokens} tokens do not fit without overlapping (texts hold: {rooms}): give "
            f"`windows`={sum(most)}, a longer text or a shorter `context`"
        )
    cut = [
        Window(text.name, first, (*prefix, *held[first : first + own]), len(prefix), number)
        for number, (text, held, share) in enumerate(zip(used, ids, _shares(count, most), strict=True))
        for first in _starts(len(held), own, share)
    ]
    _check_copies(cut)
    return cut


def _shares(count: int, most: Sequence[int]) -> list[int]:
    """Return how many of `count` windows each text gets: equal numbers as far as texts hold so many, one more for the first."""
    shares = [0] * len(most)
    while sum(shares) < count:
        for number, room in enumerate(most):
            shares[number] += shares[number] < room and sum(shares) < count
    return shares


def _starts(length: int, own: int, share: int) -> list[int]:
    """Return the first tokens of `share` windows of `own` tokens in a text of `length`."""
    step = (length - own) / max(1, share - 1)
    return [int(i * min(step, length // share)) for i in range(share)]


def _check_copies(cut: Sequence[Window]) -> None:
    first: dict[tuple[int, ...], Window] = {}
    for window in cut:
        other = first.setdefault(window.ids, window)
        if other is not window:
            raise UsageError(
                f"windows at token {other.first} of {other.text} and at token {window.first} of {window.text} are copies, as a "
                f"text is given twice or repeats itself: {len({each.ids for each in cut})} of these {len(cut)} windows differ; "
                "give another text, or fewer windows"
            )
