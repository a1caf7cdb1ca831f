"""Needles in a haystack: RULER's eight tasks (Hsieh et al. 2024, `scripts/data/synthetic/niah.py` and `synthetic.yaml`).

Different from RULER's: the running text is that of the shipped texts, from a random sentence on; keys are of their words;
needles are in random order in every item.
"""

import random
import uuid
from typing import Literal

from elastickv.evaluation.tasks.shipped_material import NOISE, Material
from elastickv.evaluation.tasks.synthetic_task import RULER, Draft, Size, SyntheticTask, Wording, shuffled_into

Haystack = Literal["noise", "essay", "needle"]
Kind = Literal["numbers", "words", "uuids"]
_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_ONE = (
    Wording(
        "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
        "{kind} afterwards.\n{context}\nWhat is the special magic {kind} for {query} mentioned in the provided text?",
        " The special magic {kind} for {query} mentioned in the provided text is",
    ),
    Wording(
        "Read the text below. It contains a special magic {kind}, which you will be asked for at the end.\n{context}\n"
        "Which special magic {kind} does the text above give for {query}?",
        " The text gives for {query} the special magic {kind}",
    ),
)
_SEVERAL = (
    Wording(
        "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about the "
        "{kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided text?",
        " The special magic {kind} for {query} mentioned in the provided text are",
    ),
    Wording(
        "Read the text below. It contains special magic {kind}, which you will be asked for at the end.\n{context}\n"
        "Which special magic {kind} does the text above give for {query}? Name all of them.",
        " The text gives for {query} the special magic {kind}",
    ),
)


class Needles(SyntheticTask):
    """Sentences that name a value for a key, hidden in a haystack; the question is for the values of some keys."""

    source = f"{RULER}, over the shipped texts"
    answer_tokens = 128

    def __init__(
        self,
        name: str,
        haystack: Haystack,
        kinds: tuple[Kind, Kind] = ("words", "numbers"),
        keys: int = 1,
        values: int = 1,
        queries: int = 1,
    ) -> None:
        self.name, self._haystack = name, haystack
        (self._key_kind, self._value_kind) = kinds
        self._keys, self._values, self._queries = max(keys, queries), values, queries
        self.wordings = _ONE if values * queries == 1 else _SEVERAL

    def draft(self, rng: random.Random, size: Size, material: Material) -> Draft:
        """Draw keys with their values, and hide them."""
        keys = [_drawn(rng, self._key_kind, material) for _ in range(self._keys)]
        values = [[_drawn(rng, self._value_kind, material) for _ in range(self._values)] for _ in keys]
        needles = [self._needle(key, value) for key, of_key in zip(keys, values, strict=True) for value in of_key]
        rng.shuffle(needles)
        chosen = rng.sample(range(len(keys)), self._queries)
        queries = [keys[i] for i in chosen]
        query = f"{', '.join(queries[:-1])}, and {queries[-1]}" if len(queries) > 1 else queries[0]
        kind = self._value_kind if self._values * self._queries > 1 else self._value_kind.removesuffix("s")
        context = self._hidden(rng, needles, size.units, material)
        return Draft(context, {"kind": kind, "query": query}, tuple(value for i in chosen for value in values[i]))

    def _needle(self, key: str, value: str) -> str:
        return _NEEDLE.format(kind=self._value_kind, key=key, value=value)

    def _hidden(self, rng: random.Random, needles: list[str], units: int, material: Material) -> str:
        if self._haystack == "essay":
            return " ".join(shuffled_into(rng, material.running_text(rng, units), needles))
        lines = [NOISE] * units
        if self._haystack == "needle":
            pairs = ((_drawn(rng, self._key_kind, material), _drawn(rng, self._value_kind, material)) for _ in range(units))
            lines = [self._needle(key, value) for key, value in pairs]
        return "\n".join(shuffled_into(rng, lines, needles))


def _drawn(rng: random.Random, kind: Kind, material: Material) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return "-".join(material.different_words(rng, 2))


NEEDLES = (
    Needles("niah_single_1", "noise"),
    Needles("niah_single_2", "essay"),
    Needles("niah_single_3", "essay", ("words", "uuids")),
    Needles("niah_multikey_1", "essay", keys=4),
    Needles("niah_multikey_2", "needle"),
    Needles("niah_multikey_3", "needle", ("uuids", "uuids")),
    Needles("niah_multivalue", "essay", values=4),
    Needles("niah_multiquery", "essay", queries=4),
)
