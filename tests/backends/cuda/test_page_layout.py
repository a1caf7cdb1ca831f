"""Without a device: a page holds every element once, and its codes are decoded to the numbers that they represent."""

import itertools

import numpy as np
import pytest

from elastickv.backends.cuda.page_layout import codes_of, dequantized, key_positions, value_positions
from elastickv.kvcache.quantize import quantize_int4_keys, quantize_int8_keys_per_channel, stored_values
from elastickv.recipe import HEAD_DIMS, AttentionShape, Recipe
from elastickv.recipe.formats import FORMATS, PAGE_TOKENS, value_groups

CASES = [(fmt, dim, group) for fmt in ("bf16", "fp8", "int8", "int4") for dim in HEAD_DIMS for group in value_groups(dim)]


@pytest.mark.parametrize(("fmt", "dim", "group"), CASES)
def test_every_element_has_one_position(fmt, dim, group):
    expected = set(itertools.product(range(PAGE_TOKENS), range(dim)))
    for token, channel in (key_positions(fmt, dim), value_positions(fmt, dim, group)):
        assert len(token) * FORMATS[fmt].bits == 8 * PAGE_TOKENS * FORMATS[fmt].row_bytes(dim)
        present = channel < dim
        positions = list(zip(token[present].tolist(), channel[present].tolist(), strict=True))
        assert len(positions) == len(set(positions)) and set(positions) == expected


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_keys_per_channel_in_page_order_become_the_quantizers_numbers(dim):
    """As the kernels store them: scales, then zeros, of channels padded to 32."""
    rows = 1000 + np.random.default_rng(1).standard_normal((2 * PAGE_TOKENS, dim), dtype=np.float32)
    codes, scales, zeros = quantize_int8_keys_per_channel(rows.reshape(2, PAGE_TOKENS, dim))
    token, channel = key_positions("int8_per_channel", dim)
    stored = np.ascontiguousarray(codes[:, token, channel])
    back = codes_of(stored, "int8_per_channel", (token, channel), dim)
    plane = np.pad(np.stack([scales, zeros], axis=1), ((0, 0), (0, 0), (0, -dim % 32))).reshape(2, -1).view(np.uint16)
    assert plane.nbytes == FORMATS["int8_per_channel"].key_scales(dim).bytes_of(2 * PAGE_TOKENS)
    np.testing.assert_array_equal(back, codes)
    numbers = dequantized(back, plane, "int8_per_channel", False, "bf16", dim)
    np.testing.assert_array_equal(numbers, stored_values(rows, "int8_per_channel", False, dim))


def test_codes_in_page_order_become_the_quantizers_numbers():
    rows = np.random.default_rng(0).standard_normal((2 * PAGE_TOKENS, 80), dtype=np.float32)
    codes, scales, zeros = quantize_int4_keys(rows.reshape(2, PAGE_TOKENS, 80))
    token, channel = key_positions("int4", 80)
    padded = np.pad(codes, ((0, 0), (0, 0), (0, 16)))[:, token, channel].reshape(2, -1, 8).astype(np.uint32)
    words = (padded << (4 * np.arange(8, dtype=np.uint32))).sum(axis=-1, dtype=np.uint32)
    back = codes_of(np.ascontiguousarray(words).view(np.uint8).reshape(2, -1), "int4", (token, channel), 80)
    plane = np.pad(np.stack([scales, zeros], axis=1), ((0, 0), (0, 0), (0, 16))).reshape(2, -1).view(np.uint16)
    np.testing.assert_array_equal(back, codes)
    numbers = dequantized(back, plane, "int4", False, "bf16", 80)
    np.testing.assert_array_equal(numbers, stored_values(rows, "int4", False, 80))


def test_a_selection_has_room_for_its_lists_sizes_even_where_no_page_fits():
    pytest.importorskip("cuda.bindings.nvrtc")
    from elastickv.backends.cuda.storage import DeviceLayout

    layout = DeviceLayout.of(AttentionShape(32, 16, 8, 64), 100, "bf16", Recipe.parse("int4,pages=1/4"), paged=True)
    assert layout.lists == 0 and layout.listed == 8 * 32 * 8
