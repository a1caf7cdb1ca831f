"""Texts are cut into windows; what is shipped to calibrate on is not what is scored."""

import pytest

from elastickv.errors import UsageError
from elastickv.evaluation.texts import Text, calibration_text, evaluation_texts, read_text, windows
from tests.helpers.tiny_models import CharacterTokenizer, framing_tokenizer

TOKENIZER = CharacterTokenizer(1 << 20)


def test_no_passage_of_the_calibration_text_is_scored():
    scored = "".join(text.content for text in evaluation_texts())
    content = calibration_text().content
    assert not any(content[i : i + 100] in scored for i in range(0, len(content) - 100, 50))


def test_the_shipped_texts_are_two_works_in_plain_letters():
    texts = evaluation_texts()
    assert len(texts) == 2 and all(len(text.content) > 120_000 and text.content.isascii() for text in texts)


def test_windows_are_shared_out_and_do_not_overlap_where_there_is_room():
    texts = [Text("a", "".join(map(chr, range(100, 1100)))), Text("b", "".join(map(chr, range(2000, 2500))))]
    cut = windows(texts, TOKENIZER, 100, 5)
    assert [row.text for row in cut] == ["a", "a", "a", "b", "b"]
    assert all(len(row.ids) == 100 for row in cut)
    firsts = [row.first for row in cut[:3]]
    assert firsts[0] == 0 and all(later - first >= 100 for first, later in zip(firsts, firsts[1:], strict=False))
    assert cut[1].ids == tuple(range(100 + firsts[1], 200 + firsts[1]))


@pytest.mark.parametrize(
    ("lengths", "count", "fits"), [((150,), 3, 1), ((100,), 8, 1), ((399,), 8, 3), ((250, 900), 12, 11), ((100, 300), 8, 4)]
)
def test_windows_that_would_overlap_are_refused_with_the_number_that_fits(lengths, count, fits):
    texts = [Text(f"t{n}", "".join(map(chr, range(1000 * n, 1000 * n + length)))) for n, length in enumerate(lengths, 1)]
    with pytest.raises(UsageError, match=f"{count} windows of 100 tokens do not fit .*give `windows`={fits},"):
        windows(texts, TOKENIZER, 100, count)
    assert len({window.ids for window in windows(texts, TOKENIZER, 100, fits)}) == fits
    with pytest.raises(UsageError, match="do not fit"):
        windows(texts, TOKENIZER, 100, fits + 1)


def test_a_text_that_holds_fewer_windows_leaves_them_to_the_others():
    texts = [Text("a", "".join(map(chr, range(1000, 1250)))), Text("b", "".join(map(chr, range(2000, 2900))))]
    assert [window.text for window in windows(texts, TOKENIZER, 100, 7)] == ["a"] * 2 + ["b"] * 5


def test_special_tokens_take_room_in_a_window():
    letters = [Text("a", "".join(map(chr, range(32, 122))))]
    assert len(windows(letters, framing_tokenizer(("<s>",)), 31, 3)) == 3
    with pytest.raises(UsageError, match="give `windows`=2,"):
        windows(letters, framing_tokenizer(), 31, 3)


@pytest.mark.parametrize(
    "texts",
    [
        [Text("a", "y" * 500)],
        [Text("a", "".join(map(chr, range(1000, 1100))) * 5)],
        [Text("a", "".join(map(chr, range(1000, 1500)))), Text("b", "".join(map(chr, range(1000, 1500))))],
    ],
    ids=["one letter", "a period", "a text twice"],
)
def test_copies_are_refused(texts):
    with pytest.raises(
        UsageError, match=r"are copies, as a text is given twice or repeats itself: . of these 5 windows differ"
    ):
        windows(texts, TOKENIZER, 100, 5)


def test_a_text_that_gets_no_window_need_not_hold_one():
    texts = [Text("a", "".join(map(chr, range(1000, 1200)))), Text("b", "too short")]
    assert [window.text for window in windows(texts, TOKENIZER, 100, 1)] == ["a"]
    with pytest.raises(UsageError, match="text b has 9 tokens and a window needs 100"):
        windows(texts, TOKENIZER, 100, 2)


def test_a_short_text_is_refused():
    with pytest.raises(UsageError, match="text a has 3 tokens and a window needs 100"):
        windows([Text("a", "abc")], TOKENIZER, 100, 1)


@pytest.mark.parametrize(("content", "named"), [(b"", "empty"), (b" \n", "empty"), (b"\xff\xfe\x00", "not UTF-8")])
def test_a_file_that_is_no_text_is_refused(tmp_path, content, named):
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=named):
        read_text(path)


def test_a_text_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        read_text(tmp_path / "absent")
    with pytest.raises(UsageError, match="directory"):
        read_text(tmp_path)
