"""Texts are cut into windows; what is shipped to calibrate on is not what is scored."""

import pytest

from elastickv.errors import UsageError
from elastickv.evaluation.texts import Text, calibration_text, evaluation_texts, read_text, windows
from tests.helpers.tiny_models import CharacterTokenizer

TOKENIZER = CharacterTokenizer(1 << 20)


def test_no_passage_of_the_calibration_text_is_scored():
    scored = "".join(text.content for text in evaluation_texts())
    content = calibration_text().content
    assert not any(content[i : i + 100] in scored for i in range(0, len(content) - 100, 50))


def test_the_shipped_texts_are_two_works_in_plain_letters():
    texts = evaluation_texts()
    assert len(texts) == 2 and all(len(text.content) > 120_000 and text.content.isascii() for text in texts)


def test_windows_are_shared_out_and_do_not_overlap_where_there_is_room():
    texts = [Text("a", "".join(map(chr, range(100, 1100)))), Text("b", "x" * 500)]
    cut = windows(texts, TOKENIZER, 100, 5)
    assert [row.text for row in cut] == ["a", "a", "a", "b", "b"]
    assert all(len(row.ids) == 100 for row in cut)
    firsts = [row.first for row in cut[:3]]
    assert firsts[0] == 0 and all(later - first >= 100 for first, later in zip(firsts, firsts[1:], strict=False))
    assert cut[1].ids == tuple(range(100 + firsts[1], 200 + firsts[1]))


def test_windows_overlap_rather_than_shrink():
    cut = windows([Text("a", "y" * 150)], TOKENIZER, 100, 3)
    assert [row.first for row in cut] == [0, 25, 50]


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
