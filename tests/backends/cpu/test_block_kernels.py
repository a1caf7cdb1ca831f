"""Decode, store and gather in a serving engine's blocks, against float64 attention to the stored numbers."""

import ctypes
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import elastickv
from elastickv.backends.cpu.blocks import open_block_kernels
from elastickv.backends.cpu.blocks.block_decode import MOST_PAGES, SPLITS, most_items
from elastickv.errors import UsageError
from elastickv.recipe import HEAD_DIMS, AttentionShape, Recipe
from elastickv.recipe.formats import FORMATS, PAGE_TOKENS
from tests.helpers.host_engine import HostEngine, nothing, numbers

RECIPES = (
    "int4", "int8", "fp8", "k=int8,v=int4", "int4,vgroup=32", "bf16", "k=int8_per_channel,v=int8", "k=int4,v=int3",
    "k=int3,v=int2", "int2,vgroup=32",
)  # fmt: skip
LENGTHS = (1000, 33, 1, 128, 129, 160, 161, 2049, 31, 32)
LIMITS = {"fp32": 3e-6, "bf16": 4e-3, "fp16": 1e-3}


def error_of_a_step(of, lengths, count=1):
    """Store all but the last tokens in two chunks, then decode them in one step; return the largest error."""
    before = [n - count for n in lengths]
    half = [n * 5 // 8 for n in before]
    of.store([0] * len(lengths), half)
    of.store(half, before)
    query, output = of.decode(before, lengths)
    return max(of.errors(query, output, before, lengths))


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("head_dim", "kv_heads", "group"), [(128, 2, 4), (64, 3, 3), (128, 1, 16), (256, 2, 2), (80, 2, 1)])
@pytest.mark.parametrize("text", RECIPES)
def test_ragged_requests_attend_to_pages_and_the_window(text, head_dim, kv_heads, group, dtype):
    text = text.replace("vgroup=32", "vgroup=40") if head_dim == 80 else text
    of = HostEngine(LENGTHS, text, head_dim, kv_heads, group, dtype=dtype)
    assert error_of_a_step(of, LENGTHS) < LIMITS[dtype]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_size_of_a_head_is_supported(head_dim):
    of = HostEngine([300, 129], "k=int8,v=int4", head_dim, 2, 4)
    assert error_of_a_step(of, [300, 129]) < LIMITS["bf16"]


@pytest.mark.parametrize("window_block", [1, 4, 16, 32])
@pytest.mark.parametrize("window", [32, 100, 128])
def test_any_block_of_the_window(window, window_block):
    of = HostEngine(LENGTHS, "int4", window=window, window_block=window_block)
    assert error_of_a_step(of, LENGTHS) < LIMITS["bf16"]


@pytest.mark.parametrize("count", [2, 10, 300])
def test_several_tokens_of_a_request_see_their_own_past_only(count):
    lengths = [n + count for n in LENGTHS]
    of = HostEngine(lengths, "int4", dtype="fp32")
    assert error_of_a_step(of, lengths, count) < LIMITS["fp32"]


def test_requests_bring_different_numbers_of_tokens():
    before, after = [500, 0, 77, 1023], [501, 130, 87, 1024]
    of = HostEngine(after, "int4", dtype="fp32")
    of.store([0, 0, 0, 0], before)
    assert max(of.errors(*of.decode(before, after), before, after)) < LIMITS["fp32"]


def test_tokens_without_a_window_block_are_read_from_pages():
    lengths = [300, 200, 1000]
    of = HostEngine(lengths, "int4")
    before = [n - 1 for n in lengths]
    of.store([0] * 3, before)
    for request, first in enumerate((288, 192, 0)):
        of.window_table[request, : first // of.size] = 0
        of.first[request] = first
    assert max(of.errors(*of.decode(before, lengths), before, lengths)) < LIMITS["bf16"]


def test_a_window_one_token_short_is_noticed():
    """The check of the other tests: attention to more tokens from pages is not what they accept."""
    of = HostEngine(LENGTHS, "int4")
    before = [n - 1 for n in LENGTHS]
    of.store([0] * len(LENGTHS), before)
    query, output = of.decode(before, LENGTHS)
    of.window -= 1
    assert max(of.errors(query, output, before, LENGTHS)) > 2 * LIMITS["bf16"]


def test_steps_of_one_token_complete_pages():
    lengths = [100, 64, 31]
    of = HostEngine([n + 70 for n in lengths], "k=int8,v=int4", window=32)
    of.store([0] * 3, lengths)
    for _ in range(70):
        after = [n + 1 for n in lengths]
        before, (query, output) = lengths, of.decode(lengths, after)
        lengths = after
    assert max(of.errors(query, output, before, lengths)) < LIMITS["bf16"]


def test_a_page_that_rejected_drafts_completed_is_written_again():
    of = HostEngine([200], "int4", dtype="fp32")
    true_keys, true_values = of.keys[0].copy(), of.values[0].copy()
    of.store([0], [60])
    of.keys[0][61:66], of.values[0][61:66] = of.rows(5, 2), of.rows(5, 2)
    of.decode([60], [66])
    of.keys[0], of.values[0] = true_keys, true_values
    of.decode([61], [190])
    assert max(of.errors(*of.decode([190], [200]), [190], [200])) < LIMITS["fp32"]


def test_tokens_of_the_null_block_are_not_stored():
    of = HostEngine([40], "int4")
    keys, values, lengths, starts = of.step([0], [31], [0])
    of.kernels.store(of.blocks(), keys, values, lengths, starts, np.arange(-1, 30) % of.size)
    assert np.isnan(numbers(of.recent)).all() and (of.pages == 0xFF).all()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("text", "head_dim"), [*((text, 128) for text in RECIPES), ("int4,vgroup=40", 80), ("fp8", 80)])
def test_pages_and_windows_are_gathered_as_rows(text, head_dim, dtype):
    of = HostEngine([200, 300, 64], text, head_dim, dtype=dtype)
    of.store([0, 0, 0], [200, 300, 64])
    requests, first, count = [1, 0, 2], [33, 160, 64], [200, 31, 0]
    for exact in (False, True):
        if exact:
            first = [172, 169, 64]  # older ones have left the window
            count = [128, 31, 0]
        keys, values = (nothing((sum(count), 2, head_dim), dtype) for _ in range(2))
        of.kernels.gather(of.blocks(), requests, first, count, exact, keys, values)
        for rows, value in ((keys, False), (values, True)):
            ends = list(itertools.accumulate(count))
            for i, n, m, end in zip(requests, first, count, ends, strict=True):
                own = (of.values if value else of.keys)[i][n : n + m]
                if exact:
                    np.testing.assert_array_equal(rows[end - m : end], own)
                else:
                    expected = of.stored(i, value, 288 if i == 1 else 192)[n : n + m]
                    np.testing.assert_allclose(numbers(rows[end - m : end]), expected, rtol=4e-3, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_batches_of_any_lengths_are_the_requests_one_by_one(data):
    text, dtype = data.draw(st.sampled_from(("int4", "int8", "k=int8,v=int4"))), data.draw(st.sampled_from(("fp32", "bf16")))
    after = data.draw(st.lists(st.integers(1, 700), min_size=1, max_size=5))
    before = [max(0, n - data.draw(st.sampled_from((1, 2, 5, 40)))) for n in after]
    window, size = data.draw(st.sampled_from((32, 61, 128))), data.draw(st.sampled_from((1, 8, 32)))
    of = HostEngine(after, text, 64, 2, 3, window, size, dtype, seed=data.draw(st.integers(0, 1000)))
    of.store([0] * len(after), before)
    for request, n in enumerate(before):
        first = PAGE_TOKENS * data.draw(st.integers(0, n // PAGE_TOKENS))
        of.first[request] = first
        lost = max(first, n - window - size) // size if first else 0
        of.window_table[request, :lost] = 0
    query, output = of.decode(before, after)
    assert max(of.errors(query, output, before, after)) < LIMITS[dtype]
    for i, (n, m) in enumerate(zip(before, after, strict=True)):
        arguments = of.step([n], [m], [i])
        start = sum(after[:i]) - sum(before[:i])
        alone = of.attend(query[start : start + m - n], arguments, [i])
        np.testing.assert_array_equal(alone, output[start : start + m - n])


def test_room_is_made_for_all_items_of_a_row():
    for exact in (32, 128, 4096):
        most = 0
        for tokens in range(1, 150_000, 31):
            counts = [-(-n // PAGE_TOKENS) for n in (max(0, tokens - exact), min(tokens, exact))]
            sizes = [min(max(-(-n // SPLITS), m), MOST_PAGES) for n, m in zip(counts, (16, 8), strict=True)]
            most = max(most, sum(-(-n // size) for n, size in zip(counts, sizes, strict=True)))
            assert most <= most_items(tokens, exact)


@pytest.mark.parametrize(
    ("text", "dtype", "said"),
    [
        ("dense", "bf16", "formats only"),
        ("int4,pages=1/4", "bf16", "formats only"),
        ("int8,stride=2", "bf16", "formats only"),
        ("int4", "int4", "unknown"),
    ],
)
def test_what_no_kernel_serves_is_refused(text, dtype, said):
    with pytest.raises(UsageError, match=said):
        open_block_kernels(AttentionShape(1, 8, 2, 128), dtype, Recipe.parse(text), 128)


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("text", ["int4", "int8", "fp8", "k=int8,v=int4", "bf16"])
def test_a_slab_holds_what_the_formats_need(text, head_dim):
    recipe = Recipe.parse(text)
    n_bytes = open_block_kernels(AttentionShape(1, 2, 2, head_dim), "bf16", recipe, 128).slab_bytes
    codes = sum(32 * head_dim * FORMATS[fmt].bits // 8 for fmt in (recipe.key_format, recipe.value_format))
    assert n_bytes % 32 == 0 and codes <= n_bytes <= 32 * head_dim * 2 * 2 + 64


def test_the_slab_of_int4_is_the_documented_size():
    assert open_block_kernels(AttentionShape(1, 2, 2, 128), "bf16", Recipe.parse("int4"), 128).slab_bytes == 4736


def halves_are_correct():
    of = HostEngine([300, 70], "int8", dtype="fp16")
    of.values[1] *= np.float16(1e-5)  # less than the least normal half
    of.store([0, 0], [299, 64])
    keys, values = (nothing((64, 2, 128), "fp16") for _ in range(2))
    of.kernels.gather(of.blocks(), [1], [0], [64], False, keys, values)
    np.testing.assert_array_equal(keys, of.stored(1, False, 64).astype(np.float16))
    np.testing.assert_array_equal(values, of.stored(1, True, 64).astype(np.float16))
    query, output = of.decode([299, 64], [300, 65])
    assert next(of.errors(query, output, [299, 64], [300, 65])) < LIMITS["fp16"]


def test_halves_are_rounded_as_numpy_does():
    halves_are_correct()


@pytest.mark.parametrize(
    "variables", [{"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}, {"NUMBA_NUM_THREADS": "3"}], ids=str
)
def test_halves_are_correct_on_any_processor_and_number_of_threads(variables):
    in_process("from tests.backends.cpu.test_block_kernels import halves_are_correct; halves_are_correct()", **variables)


_ON_THREADS = """
import ctypes, sys
if sys.argv[1] != "none":
    ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
from tests.helpers.host_engine import HostEngine
from elastickv.backends.cpu.blocks import engine_threads
from elastickv.backends.cpu.blocks.openmp import loaded_openmp
of = HostEngine([700, 90, 2049], "int4", 128, 2, 4)
of.store([0, 0, 0], [699, 80, 2048])
query, output = of.decode([699, 80, 2048], [700, 90, 2049])
print(engine_threads.count(), loaded_openmp() is not None, hash(output.tobytes()), hash(of.pages.tobytes()))
"""


def in_process(code, *arguments, **environment):
    """Return the words that code prints in a process of its own."""
    source = Path(elastickv.__file__).parents[1]
    paths = {"PYTHONPATH": os.pathsep.join([str(source), str(source.parent)]), "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=os.environ | paths | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="the library's name")
def test_threads_of_an_engine_give_what_others_give():
    try:
        ctypes.CDLL("libgomp.so.1")
    except OSError:
        pytest.skip("no OpenMP runtime is installed")
    number, openmp, *expected = in_process(_ON_THREADS, "libgomp.so.1", OMP_NUM_THREADS="3")
    assert (number, openmp) == ("3", "True")
    for threads in ("1", "2"):
        number, openmp, *results = in_process(_ON_THREADS, "none", NUMBA_NUM_THREADS=threads)
        assert (number, openmp, results) == (threads, "False", expected)
