"""What a model reads begins as its tokenizer begins a text, whatever that puts before and after one."""

import pytest

from elastickv.errors import UsageError
from elastickv.evaluation.needle import cases
from elastickv.evaluation.texts import Text, windows
from elastickv.model_benchmark.run import encoded
from elastickv.transformers.tokenization import filled_prompts, prompt_tokens, special_prefix, text_prefix, text_tokens
from tests.helpers.tiny_models import FRAMES, TEXT, framing_tokenizer

PREFIXES = {"none": (), "beginning": (1,), "beginning and end": (1,), "end": (), "two and an end": (1, 3)}


@pytest.fixture(params=list(FRAMES))
def frame(request):
    return PREFIXES[request.param], framing_tokenizer(*FRAMES[request.param])


def own(text):
    return tuple(ord(letter) for letter in text)


def test_the_special_tokens_before_a_text_are_read_from_the_tokenizer(frame):
    prefix, tokenizer = frame
    assert text_prefix(tokenizer) == prefix
    assert prompt_tokens(tokenizer, "some text") == [*prefix, *own("some text")]


def test_a_text_that_spells_its_first_special_tokens_has_them_once(frame):
    prefix, tokenizer = frame
    assert prompt_tokens(tokenizer, tokenizer.decode(list(prefix)) + "hi") == [*prefix, *own("hi")]


def test_a_setting_of_the_tokenizer_counts():
    assert special_prefix(lambda text, special: own(text)) == ()
    assert special_prefix(lambda text, special: ([7, 8] if special else []) + list(own(text)) + [9] * special) == (7, 8)


def test_every_window_begins_as_a_text_and_has_its_width(frame):
    prefix, tokenizer = frame
    cut = windows([Text("a", TEXT), Text("b", TEXT[::-1])], tokenizer, 100, 4)
    assert all(window.ids[: len(prefix)] == prefix and len(window.ids) == 100 for window in cut)
    for window in cut:
        text = TEXT if window.text == "a" else TEXT[::-1]
        assert window.ids[len(prefix) :] == own(text[window.first : window.end])
        assert window.end - window.first == 100 - len(prefix)


def test_prompts_with_a_pass_key_begin_as_a_text_and_have_their_length(frame):
    prefix, tokenizer = frame
    for case in cases(tokenizer, TEXT, 600, [0.0, 0.5, 1.0]):
        assert case.ids[: len(prefix)] == prefix and len(case.ids) == 600
        # Special tokens are nowhere else: TEXT has letters from 32 on, a pass key line breaks too.
        assert min(case.ids[len(prefix) :]) >= ord("\n")


def test_every_row_of_a_benchmark_begins_as_a_text(frame):
    prefix, tokenizer = frame
    rows = filled_prompts(prefix, text_tokens(tokenizer, "abcde"), 10, 2)
    assert [len(row) for row in rows] == [10, 10] and all(tuple(row[: len(prefix)]) == prefix for row in rows)
    text = "".join(chr(token) for row in rows for token in row[len(prefix) :])
    assert text == ("abcde" * 4)[: len(text)]


def test_no_room_for_text_is_one_line():
    with pytest.raises(UsageError, match="begins with 2 special tokens"):
        filled_prompts((1, 2), [5, 6], 2)
    with pytest.raises(UsageError, match="no text after 2 special tokens"):
        windows([Text("a", TEXT)], framing_tokenizer(*FRAMES["two and an end"]), 2, 1)


def test_a_raw_prompt_and_a_chat_begin_once(frame):
    prefix, tokenizer = frame
    assert encoded(tokenizer, "hi", chat=False).tolist() == [[*prefix, *own("hi")]]
    tokenizer.chat_template = "<s>{% for message in messages %}{{ message.content }}{% endfor %}"
    assert encoded(tokenizer, "hi", chat=True).tolist() == [[1, *own("hi")]]
