"""Tasks through caches, on models of two layers: which caches are scored, with which prompts, and when decoding ends."""

import json
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from elastickv.errors import UsageError
from elastickv.evaluation.evaluate import evaluate
from elastickv.evaluation.evaluation_options import EvaluationOptions
from elastickv.evaluation.layer_progress import Progress
from elastickv.evaluation.tasks.task_answers import STEPS_PER_CHECK, scored_answers
from elastickv.evaluation.tasks.task_prompts import TaskItem
from elastickv.evaluation.texts import Text
from elastickv.results.formats.fidelity_table import fidelity_tables
from elastickv.results.kinds.evaluation_result import EvaluationResult
from tests.helpers.tiny_models import TEXT, CharacterTokenizer, tiny_llama

TEXTS = [Text("letters", TEXT)]
OPTIONS = EvaluationOptions(
    ratios=(1.0, 2.0, 64.0),
    contexts=(),
    needle_lengths=(),
    greedy_tokens=0,
    formats=("int4",),
    tasks=("fwe",),
    task_lengths=(1200,),
    task_items=3,
    task_batch=2,
)
QUESTIONS = [
    {"context": "x" * count, "question": "why?", "answers": ["because"], "metric": metric}
    for count, metric in ((400, "f1"), (900, "f1"), (400, "f1"), (410, "exact"))
]


class Phases:
    def __init__(self):
        self.names = []

    def phase(self, name):
        self.names.append(name)

    def progress(self, done, total):
        assert done <= total


@pytest.fixture(scope="module")
def loaded():
    return tiny_llama()


@pytest.fixture(scope="module")
def measured(loaded, tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "why.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    phases = Phases()
    result = evaluate(loaded, TEXTS, replace(OPTIONS, datasets=(str(path),)), None, phases)
    return result, phases.names


def test_every_cache_answers_the_same_items_as_full_attention(measured):
    result, names = measured
    task = result["tasks"][0]
    assert [cache["cache"] for cache in task["caches"]] == ["full", "full, second wording", "C=1", "C=2", "int4"]
    assert all(len(cache["scores"]) == 3 for cache in task["caches"]) and (task["tokens"], task["items"]) == (1200, 3)
    full, one = task["caches"][0], task["caches"][2]
    assert full["scores"] == one["scores"] and one["worse"] == one["better"] == 0
    assert task["caches"][3]["read_ratio"] >= 2 and "compress=64 cannot be met" in task["skipped"][0]
    assert "fwe in 1200 tokens, items 1 to 2 of 3, C=2" in names and "fwe in 1200 tokens, items 3 to 3 of 3, full" in names


def test_questions_of_a_file_are_grouped_by_metric_and_length(measured):
    result, names = measured
    f1, exact = result["tasks"][1:]
    assert (f1["task"], f1["metric"], f1["items"], exact["metric"], exact["items"]) == ("why.jsonl", "f1", 3, "exact", 1)
    assert [name for name in names if name.endswith(", full") and "why.jsonl" in name] == [
        f"why.jsonl in {f1['tokens']} tokens, items 1 to 2 of 3, full",
        f"why.jsonl in {f1['tokens']} tokens, items 3 to 3 of 3, full",
        f"why.jsonl in {exact['tokens']} tokens, items 1 to 1 of 1, full",
    ]


def test_the_result_is_read_back_and_shown(measured):
    result, _ = measured
    read = EvaluationResult.from_dict(json.loads(json.dumps(result)))
    shown = fidelity_tables(read)
    assert "| fwe " in shown and "full, second wording" in shown and "left out: compress=64" in shown
    del result["tasks"][0]["caches"][1]["scores"][0]
    with pytest.raises(UsageError, match=r"another number of scores than items for full, second wording on fwe"):
        EvaluationResult.from_dict(json.loads(json.dumps(result)))


class Script:
    """A model that answers what it is told to, and the record of what it reads."""

    def __init__(self, *answers):
        self.answers = [[ord(letter) for letter in answer] for answer in answers]
        self.seen = []

    @contextmanager
    def __call__(self, start, tokens):
        self.tokens = tokens
        yield self

    takes_several = False

    def read(self, ids):
        (column,) = ids.T
        return self.step(column)[:, None]

    def step(self, ids):
        self.seen.append(ids.tolist())
        logits = torch.zeros(len(ids), 128)
        turn = len(self.seen) - self.stepped
        for row, answer in enumerate(self.answers):
            logits[row, answer[turn] if 0 <= turn < len(answer) else 1] = 1
        return logits


def answered(script, *items, tokens=12):
    script.stepped = max(item.stepped for item in items)
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=ord("#")))
    subject = SimpleNamespace(model=model, loaded=SimpleNamespace(tokenizer=CharacterTokenizer(128)))
    none: Progress = lambda done, total: None  # noqa: E731
    return scored_answers(subject, items, None, script, tokens, none)


def item(answers, metric="all", stepped=1):
    return TaskItem(tuple(range(10, 20)), answers, stepped, metric)


def test_answers_are_scored_up_to_their_end():
    script = Script("a 12#34", "12 and 34")
    assert answered(script, item(("12", "34")), item(("12", "34"))) == [0.5, 1.0]


def test_decoding_ends_when_no_score_can_change():
    script = Script("123 and so on", "is 123")
    assert answered(script, item(("123",)), item(("123",))) == [1.0, 1.0]
    assert len(script.seen) == 6


def test_answers_that_are_looked_at_seldom_have_the_same_scores(monkeypatch):
    monkeypatch.setitem(STEPS_PER_CHECK, "cpu", 5)
    script = Script("a 12#34", "12 and 34", "#")
    assert answered(script, *[item(("12", "34"))] * 3) == [0.5, 1.0, 0.0]
    assert len(script.seen) == 10
    assert answered(Script("may or june"), item(("may",), "f1")) == [0.5]


def test_a_longer_text_may_lower_f1_so_decoding_goes_on():
    script = Script("may or june")
    assert answered(script, item(("may",), "f1")) == [0.5] and len(script.seen) == 12


def test_the_last_tokens_of_the_prompt_are_stepped_through_the_cache():
    script = Script("7", "8")
    assert answered(script, item(("7",), stepped=3), item(("9",))) == [1.0, 0.0]
    assert script.seen[:3] == [[17, 17], [18, 18], [19, 19]] and script.tokens == 14


def test_a_reference_reads_several_of_them_at_once(monkeypatch):
    monkeypatch.setattr("elastickv.evaluation.tasks.task_answers.TOKENS_AT_ONCE", 2)
    script, pieces = Script("7"), []
    script.takes_several, script.read = True, lambda ids: pieces.append(ids.tolist())
    script.step = lambda ids: torch.nn.functional.one_hot(torch.full((1,), ord("7")), 128).float()
    assert answered(script, item(("7",), stepped=4)) == [1.0] and pieces == [[[16, 17]], [[18]]]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"task_lengths": (300,)}, "`task_lengths`=300 is too short for fwe: give "),
        ({"task_lengths": (5000,)}, "5000 tokens are needed and tiny has 4096 positions"),
        ({"tasks": ()}, "nothing is measured: give `context`, `needle`, `tasks` or `dataset`"),
        ({"datasets": ("/no/such/file",)}, "/no/such/file"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(loaded, change, named):
    phases = Phases()
    with pytest.raises(UsageError, match=named):
        evaluate(loaded, TEXTS, replace(OPTIONS, **change), None, phases)
    assert phases.names == ["choosing windows and recipes"] or not phases.names


def test_a_question_that_is_too_long_is_named(loaded, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps(QUESTIONS[0] | {"context": "y" * 4000}), encoding="utf-8")
    with pytest.raises(UsageError, match=r"long.jsonl, line 1 needs \d+ tokens with the answer, and tiny has 4096 positions"):
        evaluate(loaded, TEXTS, replace(OPTIONS, tasks=(), datasets=(str(path),)), None, Phases())
