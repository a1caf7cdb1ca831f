"""The published selections by name. A new one is a file beside this one and a line here."""

from elastickv.errors import UsageError
from elastickv.evaluation.kv_selections.h2o import HeavyHitterOracle
from elastickv.evaluation.kv_selections.kvpress_scorers import PREFIX, KvpressScorer
from elastickv.evaluation.kv_selections.quest import QUEST, QUEST_EVERY_LAYER
from elastickv.evaluation.kv_selections.reference_selection import ReferenceSelection
from elastickv.evaluation.kv_selections.snapkv import SnapKV
from elastickv.evaluation.kv_selections.streaming_llm import StreamingLLM

SELECTIONS: dict[str, ReferenceSelection] = {
    selection.name: selection for selection in (StreamingLLM(), QUEST, QUEST_EVERY_LAYER, SnapKV(), HeavyHitterOracle())
}
ALL = "all"


def parse_selections(text: str | None) -> tuple[str, ...]:
    """Return the names of a list, each once.

    Parameters
    ----------
    text : names, separated by commas; `all` stands for those that need no kvpress. None: no selection.

    Raises
    ------
    UsageError : naming what is unknown, or why a scorer of kvpress cannot run.
    """
    names: list[str] = []
    for name in [] if text is None else text.split(","):
        names += [*SELECTIONS] if name.strip() == ALL else [name.strip()]
    for name in names:
        selection_of(name)
    return tuple(dict.fromkeys(names))


def selection_of(name: str) -> ReferenceSelection:
    """Return the selection that a name stands for.

    Raises
    ------
    UsageError : as `parse_selections`.
    """
    if name in SELECTIONS:
        return SELECTIONS[name]
    if name.startswith(PREFIX):
        return KvpressScorer(name.removeprefix(PREFIX))
    accepted = ", ".join([ALL, *SELECTIONS, f"{PREFIX}NAME with a scorer of kvpress, as in {PREFIX}KnormPress"])
    raise UsageError(f"selection {name or 'without a name'} is unknown: choose {accepted}")
