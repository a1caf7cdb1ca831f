"""JSON that line tools can read, and files that appear whole or not at all."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.errors import UsageError
from elastickv.results.files import check_writable
from elastickv.results.formats import dumps, write_text

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(values)
def test_json_reads_back_equal(value):
    assert json.loads(dumps(value)) == value


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_have_no_exponent(number):
    assert not set("eE") & set(dumps(number))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_refused(number):
    with pytest.raises(ValueError, match="not a figure"):
        dumps({"time_ms": number})


def test_one_scalar_a_line():
    assert dumps({"a": [1, 2.5], "b": {"c": None}}).splitlines() == [
        "{", '  "a": [', "    1,", "    2.5", "  ],", '  "b": {', '    "c": null', "  }", "}",
    ]  # fmt: skip


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "result.json"
    write_text(path, "old")
    write_text(path, "new\n")
    assert path.read_text() == "new\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_text(path, "old")

    def disk_full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("elastickv.results.files.os.fsync", disk_full)
    with pytest.raises(UsageError, match="No space left on device"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_where_nothing_can_be_written_is_said_before_measuring(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        check_writable(tmp_path / "missing" / "result.json")
    with pytest.raises(UsageError, match="is a folder"):
        check_writable(tmp_path)
    check_writable(tmp_path / "result.json")
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_followed_and_permissions_are_kept(tmp_path):
    target, link = tmp_path / "real.json", tmp_path / "link.json"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", ["a" * 300 + ".json", "null\0.json"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path, name):
    with pytest.raises((UsageError, ValueError)):
        check_writable(tmp_path / name)


def test_text_that_is_no_unicode_is_written_escaped(tmp_path):
    write_text(tmp_path / "x.txt", "bad\udcff")
    assert (tmp_path / "x.txt").read_text() == "bad\\udcff"
    assert len(list(tmp_path.iterdir())) == 1
