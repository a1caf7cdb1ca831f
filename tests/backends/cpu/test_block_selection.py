"""Pages that rows of queries list in a serving engine's blocks, and attention to listed pages alone."""

import numpy as np
import pytest

from elastickv.backends.cpu.blocks.host_blocks import EVERY_PAGE, NO_ROW, AnchorField, RowField, address
from elastickv.recipe.formats import PAGE_TOKENS
from tests.helpers.host_engine import HostEngine, numbers

LENGTHS = (1000, 300, 200, 2049)
LIMITS = {"fp32": 3e-6, "bf16": 4e-3, "fp16": 1e-3}


def stored(text, head_dim, kv_heads, group, dtype="fp32"):
    """Return an engine with all but the last token of each request, and the last step's arguments and queries."""
    of = HostEngine(LENGTHS, text, head_dim, kv_heads, group, dtype=dtype)
    before = [n - 1 for n in LENGTHS]
    of.store([0] * len(LENGTHS), before)
    return of, of.store(before, LENGTHS), of.rows(len(LENGTHS), kv_heads * group)


def listed(of, query, pages, counts):
    """Return lists of each request and KV head by the kernel: -1 behind their ends."""
    lists = np.full((len(pages), of.kv_heads, max(map(max, counts)) + 2), -1, np.int32)
    anchors = np.zeros((len(pages), len(AnchorField) + of.kv_heads), np.int64)
    for row, anchor in enumerate(anchors):
        anchor[: len(AnchorField)] = row, row, pages[row], address(lists[row]), lists.strides[1]
        anchor[len(AnchorField) :] = counts[row]
    of.kernels.list_pages(of.blocks(), query, anchors)
    return lists


@pytest.mark.parametrize(
    ("text", "head_dim", "kv_heads", "group", "dtype"),
    [
        ("int4", 128, 2, 4, "fp32"),
        ("int4,vgroup=32", 64, 3, 3, "bf16"),
        ("k=int8_per_channel,v=int8", 80, 2, 1, "fp16"),
        ("k=int3,v=int2", 128, 1, 16, "fp32"),
    ],
)
def test_the_best_pages_are_listed_and_the_first_one_always(text, head_dim, kv_heads, group, dtype):
    of, _, query = stored(text, head_dim, kv_heads, group, dtype)
    pages = [(n - of.window) // PAGE_TOKENS for n in LENGTHS]
    counts = [[max(1, count * (head + 2) // 8) for head in range(kv_heads)] for count in pages]
    lists = listed(of, query, pages, counts)
    for request, row in enumerate(lists):
        for head, best in enumerate(of.best_pages(request, query[request], pages[request], counts[request])):
            count = counts[request][head]
            assert best[0] == 0 and row[head, :count].tolist() == best.tolist()
            assert (row[head, count:] == -1).all()


def test_a_head_that_lists_as_many_pages_as_there_are_lists_all():
    of, _, query = stored("int4", 64, 2, 2)
    lists = listed(of, query[:1], [20], [[20, 3]])
    assert lists[0, 0, :20].tolist() == list(range(20))


def test_queries_that_are_no_numbers_list_pages_that_there_are():
    of, _, query = stored("int4", 64, 2, 2)
    query[0], query[1] = -np.nan, np.inf
    lists = listed(of, query[:2], [20, 5], [[19, 7], [4, 1]])
    for request, (pages, counts) in enumerate(((20, (19, 7)), (5, (4, 1)))):
        for head, count in enumerate(counts):
            assert ((lists[request, head, :count] >= 0) & (lists[request, head, :count] < pages)).all()


def errors(of, arguments, query, pages, counts, selected):
    output = of.attend(query, arguments, list(range(len(LENGTHS))), selected)
    for request, length in enumerate(LENGTHS):
        best = of.best_pages(request, query[request], pages[request], counts[request])
        unread = [np.setdiff1d(np.arange(pages[request]), each) for each in best]
        expected = of.expected(request, length, query[request], unread)
        yield np.linalg.norm(numbers(output[request]) - expected) / np.linalg.norm(expected)


def selection(of, lists, pages, counts):
    selected = np.zeros((len(pages), len(RowField) + of.kv_heads), np.int64)
    for row, entry in enumerate(selected):
        entry[: len(RowField)] = address(lists[row]), lists.strides[1], pages[row]
        entry[len(RowField) :] = counts[row]
    return selected


@pytest.mark.parametrize("dtype", LIMITS)
def test_rows_attend_to_listed_pages_the_pages_behind_them_and_the_window(dtype):
    of, arguments, query = stored("int4", 64, 2, 3, dtype)
    pages = [max(0, (n - of.window) // PAGE_TOKENS - 3) for n in LENGTHS]  # three have left the window since
    counts = [[min(count, max(1, count // 4)), min(count, max(1, count // 2))] for count in pages]
    lists = listed(of, query, pages, counts)
    selected = selection(of, lists, pages, counts)
    assert max(errors(of, arguments, query, pages, counts, selected)) < LIMITS[dtype]
    # A wrong page, or one that is read twice, is noticed.
    lists[0, 1, 1] = next(page for page in range(1, pages[0]) if page not in lists[0, 1])
    assert max(errors(of, arguments, query, pages, counts, selected)) > 2 * LIMITS[dtype]


def test_rows_without_a_list_read_every_page_and_rows_that_do_not_attend_are_left_alone():
    of, arguments, query = stored("int4", 64, 2, 3)
    selected = np.zeros((len(LENGTHS), len(RowField) + of.kv_heads), np.int64)
    selected[:, RowField.LIST] = EVERY_PAGE
    selected[1, RowField.LIST] = NO_ROW
    output = of.attend(query, arguments, list(range(len(LENGTHS))), selected)
    whole = of.attend(query, arguments, list(range(len(LENGTHS))))
    assert np.isnan(output[1]).all()
    np.testing.assert_array_equal(np.delete(output, 1, 0), np.delete(whole, 1, 0))
