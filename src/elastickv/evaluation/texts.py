"""Texts to score and to calibrate on: those of the package, or a user's files, cut into windows of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastickv import inputs
from elastickv.errors import UsageError

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
    """Consecutive tokens of one text.

    Attributes
    ----------
    text : the text's name.
    first : number of the window's first token in its text.
    ids : the tokens.
    """

    text: str
    first: int
    ids: tuple[int, ...]


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
    """Return `count` windows of `tokens` tokens, divided evenly among the texts and evenly spaced within each.

    They overlap only where a text is too short to hold all of them.

    Raises
    ------
    UsageError : if a text has fewer than `tokens` tokens.
    """
    cut = []
    for number, text in enumerate(texts):
        share = count // len(texts) + (number < count % len(texts))
        if not share:
            continue
        ids = tokenizer(text.content, add_special_tokens=False, verbose=False).input_ids
        if len(ids) < tokens:
            raise UsageError(
                f"text {text.name} has {len(ids)} tokens and a window needs {tokens}: give a longer text or a shorter context"
            )
        step = (len(ids) - tokens) / max(1, share - 1)
        for i in range(share):
            first = int(i * min(step, (len(ids) // share)))
            cut.append(Window(text.name, first, tuple(ids[first : first + tokens])))
    return cut
