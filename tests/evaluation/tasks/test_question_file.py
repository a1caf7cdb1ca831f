"""Files of questions: what is read, and how each wrong line is refused."""

import json

import pytest

from elastickv.errors import UsageError
from elastickv.evaluation.tasks.question_file import read_questions
from tests.helpers.tiny_models import CharacterTokenizer

GOOD = {"context": "It was {cold} in May.", "question": "When?", "answers": ["May", "in May"], "_id": 7, "length": 4}


def written(tmp_path, *lines):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_other_keys_are_ignored_and_one_answer_may_be_a_string(tmp_path):
    path = written(tmp_path, GOOD, "", GOOD | {"answers": "May", "metric": "exact"})
    first, second = read_questions(path)
    assert (first.line, first.answers, first.metric) == (1, ("May", "in May"), "f1")
    assert (second.line, second.answers, second.metric) == (3, ("May",), "exact")


def test_both_wordings_hold_context_and_question(tmp_path):
    (question,) = read_questions(written(tmp_path, GOOD))
    texts = ["".join(map(chr, item.ids)) for item in question.items(CharacterTokenizer(128))]
    assert all("It was {cold} in May." in text and text.endswith("Question: When?\nAnswer:") for text in texts)
    assert texts[0] != texts[1]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"context": ', "line 2 is no JSON (column"),
        ("[1]", "line 2 is no JSON object"),
        ({"context": "x", "answers": ["y"]}, "line 2 has no question"),
        ({}, "line 2 has no context and no question and no answers"),
        (GOOD | {"context": 5}, "line 2: context is no string"),
        (GOOD | {"question": None}, "line 2: question is no string"),
        (GOOD | {"answers": []}, "line 2: answers is no list of strings"),
        (GOOD | {"answers": ["May", 5]}, "line 2: answers is no list of strings"),
        (GOOD | {"answers": " "}, "line 2: answers is no list of strings"),
        (GOOD | {"metric": "rouge"}, 'line 2: metric "rouge" is unknown: choose all, part, exact, f1'),
        (GOOD | {"metric": ["f1"]}, "line 2: metric"),
        ('{"context": "x", "context": "y"}', "line 2 is no JSON"),
    ],
)
def test_a_wrong_line_is_named_with_its_file(tmp_path, line, named):
    path = written(tmp_path, GOOD, line)
    with pytest.raises(UsageError) as refused:
        read_questions(path)
    assert str(refused.value).startswith(f"dataset {path}, {named}") and "\n" not in str(refused.value)


@pytest.mark.parametrize("lines", [(), ("", " ")])
def test_an_empty_file_is_refused(tmp_path, lines):
    with pytest.raises(UsageError, match=r"is empty: give a line \{"):
        read_questions(written(tmp_path, *lines))


def test_a_file_that_is_missing_is_refused(tmp_path):
    with pytest.raises(UsageError, match="absent"):
        read_questions(tmp_path / "absent.jsonl")
