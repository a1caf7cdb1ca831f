"""Variable tracking: RULER's `vt` (Hsieh et al. 2024, `scripts/data/synthetic/variable_tracking.py`), one chain of four hops.

As in RULER an example with its answer stands before the item, with other variables in every item.
"""

import random
import string

from elastickv.evaluation.tasks.shipped_material import NOISE, Material
from elastickv.evaluation.tasks.synthetic_task import RULER, Draft, Size, SyntheticTask, Wording, shuffled_into

_HOPS = 4
_LETTERS, _EXAMPLE_LETTERS = 5, 3
_EXAMPLE_UNITS = 5


class VariableTracking(SyntheticTask):
    """Lines such as `VAR ABCDE = 12345` and `VAR FGHIJ = VAR ABCDE` in noise, and the question which variables have a value."""

    name = "vt"
    source = RULER
    answer_tokens = 30
    wordings = (
        Wording(
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: "
            "Find all variables that are assigned the value {query} in the text above.",
            " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
            "value {query}, they are: ",
        ),
        Wording(
            "The text below assigns values to variables, directly or from other variables. Follow the "
            "assignments.\n\n{context}\nQuestion: Which variables have the value {query} at the end of the text above?",
            " Answer: {count} variables have the value {query} at the end of the text, namely ",
        ),
    )

    def draft(self, rng: random.Random, size: Size, material: Material) -> Draft:
        """Draw an example and a chain, and hide both in noise."""
        example = _chain(rng, _EXAMPLE_LETTERS, _EXAMPLE_UNITS, None)
        return _chain(rng, _LETTERS, size.units, example)


def _chain(rng: random.Random, letters: int, units: int, example: Draft | None) -> Draft:
    names: list[str] = []
    while len(names) <= _HOPS:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        names += [] if name in names else [name]
    value = str(rng.randint(10_000, 99_999))
    lines = [f"VAR {names[0]} = {value}"]
    lines += [f"VAR {later} = VAR {earlier}" for earlier, later in zip(names[:-1], names[1:], strict=True)]
    context = "\n".join(shuffled_into(rng, [NOISE] * units, lines))
    return Draft(context, {"query": value, "count": str(len(names))}, tuple(names), example)


VARIABLE_TRACKING = VariableTracking()
