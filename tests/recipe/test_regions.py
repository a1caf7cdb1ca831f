"""Page life: after the sinks, whole pages of 32, cold once wholly older than the window."""

from hypothesis import given
from hypothesis import strategies as st

from elastickv.recipe import PAGE_TOKENS, regions
from elastickv.recipe.regions import retained_tokens

sizes = st.integers(0, 300)


@given(st.integers(0, 2000), sizes, sizes)
def test_every_token_lies_in_one_region(context, sinks, window):
    split = regions(context, sinks, window)
    assert split.sinks + split.cold + split.recent == context
    assert min(split.sinks, split.cold, split.recent) >= 0


@given(st.integers(0, 2000), sizes, sizes)
def test_a_page_is_cold_exactly_when_all_its_tokens_left_the_window(context, sinks, window):
    split = regions(context, sinks, window)
    pages = split.cold // PAGE_TOKENS
    assert split.cold % PAGE_TOKENS == 0
    oldest_in_window = context - window
    assert pages == 0 or sinks + pages * PAGE_TOKENS <= oldest_in_window
    assert sinks + (pages + 1) * PAGE_TOKENS > oldest_in_window


@given(st.integers(400, 2000))
def test_between_128_and_159_recent_tokens_are_exact(context):
    assert 128 <= regions(context, 4, 128).recent <= 159


@given(st.integers(0, 500), st.integers(1, 64))
def test_a_stride_keeps_every_kth_cold_token(cold, stride):
    assert retained_tokens(cold, stride) == len(range(0, cold, stride))
