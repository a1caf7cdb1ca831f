"""Items of the synthetic tasks: what they ask has an answer in their context, and they have the length that was requested."""

import random
import re
from types import SimpleNamespace

import pytest

from elastickv.errors import UsageError
from elastickv.evaluation.tasks.cloze_questions import cloze_questions
from elastickv.evaluation.tasks.shipped_material import shipped_material
from elastickv.evaluation.tasks.synthetic_task import Size
from elastickv.evaluation.tasks.task_prompts import PromptMaker, prompt_text
from elastickv.evaluation.tasks.task_registry import TASKS, parse_tasks
from elastickv.evaluation.texts import calibration_text
from tests.helpers.tiny_models import CharacterTokenizer

MATERIAL = shipped_material()


class WordTokenizer:
    """A token a word, space or sign, as many as there are; decoding gives the text back."""

    eos_token_id = None

    def __init__(self):
        self.pieces = []
        self.numbers = {}

    def __call__(self, text, **_):
        ids = []
        for piece in re.findall(r"\w+|\W", text):
            if piece not in self.numbers:
                self.numbers[piece] = len(self.pieces)
                self.pieces.append(piece)
            ids.append(self.numbers[piece])
        return SimpleNamespace(input_ids=ids)

    def decode(self, ids, **_):
        return "".join(self.pieces[i] for i in ids)


class ChatTokenizer(WordTokenizer):
    chat_template = "a template"

    def apply_chat_template(self, chat, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return "".join(f"[{message['role']}]{message['content'].strip()}[end]" for message in chat) + "[assistant]"


def draft(name, units=60, number=0, tokens=4096):
    return TASKS[name].draft(random.Random(number), Size(tokens, units, number), MATERIAL)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("tokenizer", [WordTokenizer, ChatTokenizer])
def test_every_item_has_the_length_that_was_requested_in_both_wordings(name, tokenizer):
    task = TASKS[name]
    maker = PromptMaker(tokenizer(), task, 5000, 3, MATERIAL)
    for number in range(3):
        items = maker.items(number)
        assert {len(item.ids) for item in items} == {5000 - task.answer_tokens}
        assert items[0].answers == items[1].answers and items[0].ids != items[1].ids


@pytest.mark.parametrize("name", [name for name in TASKS if name.startswith("niah")])
def test_each_answer_of_a_needle_stands_with_its_key_once(name):
    for number in range(5):
        item = draft(name, number=number)
        needles = dict(re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", item.context)[::-1])
        for answer in item.answers:
            assert item.context.count(answer) == 1
        assert {key for key in needles if needles[key] in item.answers} == set(
            re.findall(r"[\w-]+-[\w-]+", item.fields["query"])
        )


def test_values_and_queries_are_as_many_as_the_name_says():
    assert [len(draft(f"niah_{name}").answers) for name in ("single_1", "multikey_1", "multivalue", "multiquery")] == [
        1,
        1,
        4,
        4,
    ]


def test_all_tracked_variables_have_the_value():
    item = draft("vt")
    values = {}
    for name, right in re.findall(r"VAR (\w+) = (.+)", item.context):
        values[name] = values[right.removeprefix("VAR ")] if right.startswith("VAR ") else right
    assert [name for name, value in values.items() if value == item.fields["query"]] == list(item.answers)
    assert item.example.answers != item.answers and item.fields["count"] == "5"


@pytest.mark.parametrize("tokens", [1000, 4096])
def test_common_words_are_those_that_appear_most_often(tokens):
    item = draft("cwe", tokens=tokens)
    counts = {}
    for word in re.findall(r"\d+\. (\w+)", item.context):
        counts[word] = counts.get(word, 0) + 1
    assert set(sorted(counts, key=counts.get)[-10:]) == set(item.answers)
    assert min(counts[word] for word in item.answers) >= 6 * max(c for w, c in counts.items() if w not in item.answers)
    assert item.example.listed_answers().startswith(f"1. {item.example.answers[0]} 2. ")


def test_frequent_words_follow_the_dots():
    item = draft("fwe", units=1500)
    words = item.context.split()
    ranked = sorted(set(words), key=words.count)[::-1]
    assert ranked[0] == "..." and ranked[1:4] == list(item.answers)
    assert words.count(ranked[1]) / words.count("...") == pytest.approx(1 / 4, abs=0.01)


def test_the_answer_of_a_cloze_stands_in_one_document_and_the_sentence_too():
    for number in range(20):
        item = draft("qa_cloze", units=12, number=number)
        sentence = item.fields["query"].replace("_____", item.answers[0])
        assert len(re.findall(rf"\b{item.answers[0]}\b", item.context, re.IGNORECASE)) == 1
        (document,) = [text for text in item.context.split("\n\nDocument ") if sentence in text]
        assert item.context.count("Document ") >= 12 and document


def test_no_question_shows_its_answer_and_no_document_has_it_in_another_word():
    documents = "\n".join(MATERIAL.paragraphs).lower()
    for number, (_, sentence, word) in enumerate(cloze_questions(MATERIAL)):
        query = draft("qa_cloze", units=2, number=number).fields["query"]
        assert "_____" in query and word.lower() not in query.lower() and word in sentence
        assert documents.count(word.lower()) == 1


def test_questions_do_not_repeat_for_five_hundred_items_and_none_is_of_the_calibration_text():
    questions = cloze_questions(MATERIAL)
    calibrated = " ".join(calibration_text().content.split())
    assert len({sentence for _, sentence, _ in questions}) == len(questions) >= 500
    assert not any(paragraph in calibrated for paragraph in MATERIAL.paragraphs)


def test_turns_after_the_first_message_are_read_through_the_cache():
    tokenizer = ChatTokenizer()
    item, _ = PromptMaker(tokenizer, TASKS["multi_turn"], 4000, 1, MATERIAL).items(0)
    later = tokenizer.decode(item.ids[-item.stepped :])
    assert later.startswith("The special magic number for") and later.count("[user]") == 3 and later.count("[assistant]") == 3
    assert item.answers[0] not in later and item.answers[0] in tokenizer.decode(item.ids)
    single, _ = PromptMaker(tokenizer, TASKS["niah_single_1"], 4000, 1, MATERIAL).items(0)
    assert single.stepped == 1


def test_an_example_with_its_answer_stands_before_the_item():
    tokenizer = WordTokenizer()
    item, _ = PromptMaker(tokenizer, TASKS["vt"], 4000, 1, MATERIAL).items(0)
    text = tokenizer.decode(item.ids)
    assert text.count("they are:") == 2 and not any(
        answer in text.split("they are:")[1].split("\n")[0] for answer in item.answers
    )


def test_a_chat_template_takes_the_prompt_and_the_answer_begins_after_it():
    assert prompt_text(ChatTokenizer(), ["Which?"], " It is ") == "[user]Which?[end][assistant]It is"
    assert prompt_text(CharacterTokenizer(128), ["Which?"], " It is ") == "Which? It is"


def test_a_length_that_is_too_short_names_the_shortest_one():
    with pytest.raises(UsageError, match=r"too short for cwe: give (\d+) or more") as refused:
        PromptMaker(WordTokenizer(), TASKS["cwe"], 300, 2, MATERIAL)
    least = int(re.search(r"give (\d+)", str(refused.value))[1])
    PromptMaker(WordTokenizer(), TASKS["cwe"], least, 2, MATERIAL).items(1)


def test_names_are_parsed_once_each_and_unknown_ones_refused():
    assert parse_tasks("vt, niah_single_1,vt") == ("vt", "niah_single_1") and parse_tasks(None) == ()
    assert parse_tasks("all") == tuple(TASKS) and len(TASKS) == 13
    with pytest.raises(UsageError, match="task qa_1 is unknown: choose all, niah_single_1"):
        parse_tasks("qa_1")
