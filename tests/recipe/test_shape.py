"""A shape is one that kernels are built for, or is refused by what is wrong with it."""

import numpy as np
import pytest

from elastickv.errors import UsageError
from elastickv.recipe import AttentionShape


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("size", [0, -1, 1.0, True, "1", None])
def test_a_count_that_is_no_whole_number_from_one_up_is_refused_by_name(place, size):
    counts = [1, 1, 1]
    counts[place] = size
    with pytest.raises(
        UsageError, match=f"^{('batch', 'query_heads', 'kv_heads')[place]} is {size}: give a whole number from 1 up$"
    ):
        AttentionShape(*counts, 64)


def test_numpys_whole_numbers_are_counts_too():
    assert AttentionShape(np.int64(2), np.int32(8), np.uint8(4), 64).group == 2


def test_every_kv_head_serves_as_many_query_heads():
    assert AttentionShape(1, 12, 4, 64).group == 3
    with pytest.raises(
        UsageError, match=r"^12 query heads are not a multiple of 5 KV heads: every KV head serves the same number"
    ):
        AttentionShape(1, 12, 5, 64)


def test_a_head_without_a_kernel_is_refused_with_those_that_have_one():
    with pytest.raises(UsageError, match=r"^head_dim 100 has no kernel: supported are 64, 80, 96, 112, 128, 192, 256$"):
        AttentionShape(1, 1, 1, 100)


@pytest.mark.parametrize("sizes", [(1, 256, 1), (65535, 1, 1), (21845, 3, 3)])
def test_as_many_heads_as_a_launch_takes_are_accepted(sizes):
    AttentionShape(*sizes, 64)


@pytest.mark.parametrize(("sizes", "group"), [((1, 257, 1), 257), ((65536, 1, 1), 1), ((21846, 3, 3), 1)])
def test_more_heads_than_a_launch_takes_are_refused_with_the_limits(sizes, group):
    said = f"^{sizes[0]} sequences x {sizes[2]} KV heads with {group} query heads each is too large: at most 65535 .* and 256 "
    with pytest.raises(UsageError, match=said):
        AttentionShape(*sizes, 64)
