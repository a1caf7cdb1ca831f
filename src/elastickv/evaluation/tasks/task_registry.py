"""The tasks by name. A new one is a file beside this one and a line here."""

from elastickv.errors import UsageError
from elastickv.evaluation.tasks.cloze_questions import CLOZE_QUESTIONS
from elastickv.evaluation.tasks.needles import NEEDLES
from elastickv.evaluation.tasks.recall_over_turns import RECALL_OVER_TURNS
from elastickv.evaluation.tasks.synthetic_task import SyntheticTask
from elastickv.evaluation.tasks.variable_tracking import VARIABLE_TRACKING
from elastickv.evaluation.tasks.word_counts import COMMON_WORDS, FREQUENT_WORDS

TASKS: dict[str, SyntheticTask] = {
    task.name: task for task in (*NEEDLES, VARIABLE_TRACKING, COMMON_WORDS, FREQUENT_WORDS, CLOZE_QUESTIONS, RECALL_OVER_TURNS)
}
ALL = "all"


def parse_tasks(text: str | None) -> tuple[str, ...]:
    """Return the names of a list, each once.

    Parameters
    ----------
    text : names, separated by commas; `all` stands for all of them. None: no task.

    Raises
    ------
    UsageError : naming what is unknown.
    """
    names: list[str] = []
    for name in [] if text is None else text.split(","):
        names += [*TASKS] if name.strip() == ALL else [name.strip()]
    for name in names:
        if name not in TASKS:
            raise UsageError(f"task {name or 'without a name'} is unknown: choose {', '.join([ALL, *TASKS])}")
    return tuple(dict.fromkeys(names))
