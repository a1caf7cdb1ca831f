"""The roofline is min(compute, intensity x bandwidth), and its score is not capped."""

import pytest

from elastickv.backends import Ceilings
from elastickv.benchmark.contenders import plan_rotation
from elastickv.benchmark.roofline import attention_flops, roofline_point
from elastickv.recipe import DENSE, AttentionShape, Recipe

SHAPE = AttentionShape(2, 8, 2, 64)


def test_dense_flops_are_four_per_element_per_query():
    assert attention_flops(DENSE, [100, 50], SHAPE) == 4 * 150 * 8 * 64


def test_a_stride_computes_only_what_it_keeps():
    # 292 tokens: 4 sinks, 160 cold (40 kept), 128 recent.
    assert attention_flops(Recipe.parse("bf16,stride=4"), [292], SHAPE) == 4 * (132 + 40) * 8 * 64


def test_a_selection_computes_the_pages_that_it_reads():
    # 452 tokens: 4 sinks, 10 cold pages, 128 recent. A quarter of 10 pages, or of 9, is 2; half of 10 is 5.
    assert attention_flops(Recipe.parse("int4,pages=1/4"), [452], SHAPE) == 4 * (132 + 64) * 8 * 64
    assert attention_flops(Recipe.parse("int4,pages=1/4:1/2"), [452], SHAPE) == 4 * (2 * 132 + 64 + 160) * 4 * 64
    # The tenth page turned cold after every anchor but the one at this very step: it is read beside the list.
    rows = (132 + 64 + 3 * (132 + 64 + 32)) / 4
    assert attention_flops(Recipe.parse("int4,pages=1/4,anchor_every=4"), [452], SHAPE) == 4 * rows * 8 * 64


def test_a_reused_output_is_not_computed_between_anchors():
    rows = (132 + 320 + 3 * (132 + 32)) / 4
    assert attention_flops(Recipe.parse("bf16,reuse,anchor_every=4"), [452, 452], SHAPE) == 2 * 4 * rows * 8 * 64


def test_below_the_ridge_bandwidth_limits_and_above_it_compute():
    ceilings = Ceilings(read_gbs=100, copy_gbs=80, flops=1e12)
    low = roofline_point(1.0, 1e9, 1e9, ceilings)
    assert low.attainable_gflops == pytest.approx(100)
    assert low.score == pytest.approx(0.01)
    high = roofline_point(1.0, 1e9, 1e12, ceilings)
    assert high.attainable_gflops == pytest.approx(1000)
    assert roofline_point(0.001, 1e9, 1e9, ceilings).score == pytest.approx(10)


@pytest.mark.parametrize("anchor_every", [1, 3, 5])
def test_a_cold_rotation_exceeds_the_cache_in_whole_anchor_intervals(anchor_every):
    rotation = plan_rotation(1e6, 64, anchor_every, 32e6, True, 1000)
    assert rotation.cold
    assert rotation.touched_bytes >= 64e6
    assert rotation.copies % anchor_every == rotation.steps % anchor_every == 0
    assert rotation.steps >= max(64, rotation.copies)


def test_what_memory_cannot_hold_is_not_called_cold():
    assert not plan_rotation(1e6, 64, 1, 32e6, True, 10).cold
    assert not plan_rotation(1e6, 64, 1, 32e6, False, 1000).cold
    assert plan_rotation(1e6, 64, 1, 32e6, False, 1000).copies == 1
