"""What a synthetic task is: how an item is drawn, how it is worded, and how an answer is scored."""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from elastickv.evaluation.tasks.shipped_material import Material

RULER = "RULER, arXiv 2404.06654"


@dataclass(frozen=True)
class Wording:
    """The words around an item.

    Attributes
    ----------
    instruction : what the user writes: a format string with `context` and the item's own fields.
    answer_prefix : the words with which the answer begins, in the prompt.
    follow_up : for tasks of several turns, what the user asks in each later turn: a format string with `key`.
    """

    instruction: str
    answer_prefix: str
    follow_up: str = ""


@dataclass(frozen=True)
class Draft:
    """An item before it is tokens.

    Attributes
    ----------
    context : the text that holds the answers.
    fields : what fills the wording.
    answers : the strings that the answer is matched with.
    example : an item with its answer that stands before this one, where the task has one.
    earlier : (question's key, answer) of the turns before the last one.
    """

    context: str
    fields: dict[str, str]
    answers: tuple[str, ...]
    example: "Draft | None" = None
    earlier: tuple[tuple[str, str], ...] = field(default=())

    def listed_answers(self) -> str:
        """Return the answers as an example shows them."""
        return self.fields.get("listed", " ".join(self.answers))


@dataclass(frozen=True)
class Size:
    """Which item is drawn, and how large.

    Attributes
    ----------
    tokens : of prompt and answer.
    units : how many units of filler the context has.
    number : of the item among those of its task and length.
    """

    tokens: int
    units: int
    number: int = 0


class SyntheticTask(ABC):
    """A task whose items are drawn at random.

    Attributes
    ----------
    name : as on the command line and in results.
    source : the publication, and what differs from it.
    metric : `all`, the share of the answers that are in the text, or `part`, whether one of them is.
    answer_tokens : tokens that are generated.
    wordings : two; the second shows how far a score moves with the words of the prompt alone.
    least_units : the fewest units of filler with which an item can be drawn.
    """

    name: str
    source: str
    metric: str = "all"
    answer_tokens: int
    wordings: tuple[Wording, Wording]
    least_units: int = 1

    @abstractmethod
    def draft(self, rng: random.Random, size: Size, material: Material) -> Draft:
        """Draw an item of a size; equal states of `rng` and sizes give equal items."""


def shuffled_into(rng: random.Random, units: Sequence[str], inserted: Sequence[str]) -> list[str]:
    """Return units with other lines inserted at random places, in the order given."""
    positions = sorted(rng.randint(0, len(units)) for _ in inserted)
    merged = list(units)
    for position, line in reversed(list(zip(positions, inserted, strict=True))):
        merged.insert(position, line)
    return merged
