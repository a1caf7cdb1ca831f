"""Bytes of every format against a count by hand, and which tokens of a sequence are in it."""

import re
from pathlib import Path

import pytest

from elastickv.errors import UsageError
from elastickv.evaluation.exact_tokens import ExactTokens
from elastickv.evaluation.kv_formats.lloyd_max import boundaries, normal_codebook
from elastickv.evaluation.kv_formats.published_formats import PUBLISHED, format_of, parse_formats
from elastickv.recipe import Recipe

# For a head of 128 channels: bytes of a token of K and of V, or of the tokens that share scales.
BY_HAND = {
    "fp8_per_tensor": (128, 128),
    "fp8_per_tensor_calibrated": (128, 128),
    "fp8_per_token_head": (128 + 4, 128 + 4),
    "int8_per_token_head": (128 + 4, 128 + 4),
    "int4_per_token_head": (64 + 4, 64 + 4),
    "int4_per_token_head_unrotated": (64 + 4, 64 + 4),
    "q8_0": (4 * 34, 4 * 34),  # sizeof(block_q8_0) = 34
    "q8_0_rotated": (4 * 34, 4 * 34),
    "q4_0": (4 * 18, 4 * 18),  # sizeof(block_q4_0) = 18
    "q4_0_rotated": (4 * 18, 4 * 18),
    "kivi2": (128 * (8 + 4), 32 + 4 * 4),  # 32 tokens of K: 8 bytes of codes, a scale and a zero for each channel
    "kivi4": (128 * (16 + 4), 64 + 4 * 4),
    "kivi2_r32": (128 * (8 + 4), 32 + 4 * 4),
    "kivi4_r32": (128 * (16 + 4), 64 + 4 * 4),
    "turboquant2": (32 + 2, 32 + 2),
    "turboquant3": (48 + 2, 48 + 2),
    "turboquant4": (64 + 2, 64 + 2),
    "turboquant2_qjl": (16 + 16 + 4, 32 + 2),
    "turboquant3_qjl": (32 + 16 + 4, 48 + 2),
    "turboquant4_qjl": (48 + 16 + 4, 64 + 2),
    "turboquant_k8v4": (128, 64 + 4),
    "turboquant_4bit_nc": (64 + 2, 64 + 4),
    "turboquant_k3v4_nc": (48 + 2, 64 + 4),
    "turboquant_3bit_nc": (48 + 2, 48 + 4),
    "nvfp4": (64 + 8, 64 + 8),
    "nvfp4_calibrated": (64 + 8, 64 + 8),
    "mxfp4": (64 + 4, 64 + 4),
    "kvarn_k4v2_g128": (8192 + 768, 4096 + 768),  # 768: three planes of 128 float16
    "kvarn_k4v4_g128": (8192 + 768, 8192 + 768),  # 17920 for both: the record of the vLLM fork
    "kvarn_k4v4_g128_plain": (8192 + 512, 8192 + 512),
    "fp8_per_channel": (128 * (32 + 2), 128 + 4),
    "fp8_per_channel_centered": (128 * (32 + 4), 128 + 4),
}


def test_every_format_is_counted():
    assert BY_HAND.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_codes_scales_and_zeros_are_counted(name):
    published = PUBLISHED[name]
    keys, values = published.keys, published.values
    assert (keys.group_bytes(128), values.group_bytes(128)) == BY_HAND[name]
    assert published.bits_per_element(128) == 4 * (BY_HAND[name][0] / keys.group + BY_HAND[name][1] / values.group) / 128


@pytest.mark.parametrize("name", PUBLISHED)
def test_many_tokens_take_the_bits_of_the_format(name):
    published, tokens = PUBLISHED[name], 1 << 22
    bits = 8 * published.stored_bytes(tokens, 128, 2, 3) / (2 * tokens * 128 * 2 * 3)
    assert bits == pytest.approx(published.bits_per_element(128), rel=1e-3)


def test_exact_tokens_take_two_bytes_an_element():
    """KIVI with R = 128 at 300 tokens: 256 keys are quantized, and all values but the newest 129."""
    kivi = PUBLISHED["kivi2"]
    assert (kivi.keys.stored_tokens(300, 0), kivi.values.stored_tokens(300, 0)) == (256, 171)
    keys, values = 8 * 128 * 12 + 44 * 256, 171 * 48 + 129 * 256
    assert kivi.stored_bytes(300, 128, 2, 3) == 2 * 3 * (keys + values)


def test_keys_are_quantized_after_the_step_that_fills_the_residual():
    keys = PUBLISHED["kivi2_r32"].keys
    assert [keys.stored_tokens(tokens, 0) for tokens in (31, 32, 33, 64, 65)] == [0, 0, 32, 32, 64]
    tile = PUBLISHED["kvarn_k4v2_g128"]
    assert [tile.keys.stored_tokens(tokens, tile.sinks) for tokens in (100, 256, 257)] == [0, 0, 128]
    assert PUBLISHED["q4_0"].keys.stored_tokens(1, 0) == 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_equal_windows_leave_the_same_tokens_exact(name):
    published = PUBLISHED[name].with_exact(ExactTokens(4, 128))
    for plane in (published.keys, published.values):
        assert plane.stored_tokens(132, 4) == 0
        assert plane.stored_tokens(132 + plane.group, 4) == plane.group
        exact = 4132 - plane.stored_tokens(4132, published.sinks)
        assert 132 <= exact < 132 + plane.group <= 260


def test_codebooks_rotations_and_layer_scales_are_counted_once():
    for name, floats in (("turboquant3", 8 + 128**2), ("turboquant3_qjl", 8 + 4 + 2 * 128**2), ("q4_0", 0)):
        published = PUBLISHED[name]
        tokens = sum(BY_HAND[name]) * 10 * 2 * 3
        assert published.stored_bytes(10, 128, 2, 3) == tokens + 4 * floats
    assert PUBLISHED["nvfp4_calibrated"].stored_bytes(10, 128, 2, 3) == 144 * 10 * 2 * 3 + 3 * 2 * 4


def test_outer_layers_of_vllms_presets_stay_in_16_bit():
    preset = PUBLISHED["turboquant_4bit_nc"]
    assert preset.exact_layers(30) == {0, 1, 28, 29} and preset.exact_layers(3) == {0, 2} and not preset.exact_layers(1)
    assert PUBLISHED["turboquant4"].exact_layers(30) == set()
    codebook, token = 16 * 4, 134
    assert preset.stored_bytes(10, 128, 2, 30, 4) == codebook + 10 * 2 * (26 * token + 4 * 512)


def test_the_codebook_is_the_best_for_normal_numbers():
    """Levels and errors of Max 1960, table I."""
    known = {1: [0.7980], 2: [0.4528, 1.510], 3: [0.2451, 0.7560, 1.344, 2.152]}
    for bits, levels in known.items():
        codebook = normal_codebook(bits)
        assert codebook[len(levels) :] == pytest.approx(levels, abs=6e-4)
        assert codebook == pytest.approx([-level for level in reversed(codebook)])
    assert normal_codebook(4)[8:] == pytest.approx([0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], abs=6e-4)
    assert boundaries(normal_codebook(2)) == pytest.approx([-0.9816, 0, 0.9816], abs=2e-4)


def test_names_and_recipes_are_read_from_lists():
    assert parse_formats(["kivi2, q4_0", "k=int8,v=int4", "int4,kivi2"]) == ("kivi2", "q4_0", "k=int8,v=int4", "int4")
    assert parse_formats(["all"]) == (*PUBLISHED, "fp8", "int8", "int4", "k=int8_per_channel,v=int8", "int3", "int2")
    assert format_of("k=int8,v=int4").whole == Recipe.parse("k=int8,v=int4") and format_of("kivi2") is PUBLISHED["kivi2"]


@pytest.mark.parametrize("text", ["int5", "q4_1,kivi2", "", "kivi2,"])
def test_an_unknown_format_is_one_line_with_all_names(text):
    with pytest.raises(
        UsageError,
        match=r"^format \S.* is unknown: choose all, fp8_per_tensor, .*kvarn.*, int4, k=int8_per_channel,v=int8, int3, int2",
    ) as error:
        parse_formats([text])
    assert "\n" not in str(error.value)


def test_a_wrong_recipe_says_what_is_wrong():
    with pytest.raises(UsageError, match="format 'int5' is unknown: formats are"):
        parse_formats(["k=int5,v=int4"])


def test_heads_that_a_format_cannot_divide_are_refused():
    PUBLISHED["q4_0"].check_head(96)
    with pytest.raises(
        UsageError, match=r"^format q4_0_rotated needs heads of a multiple of 64 channels, not of 96: leave it out$"
    ):
        PUBLISHED["q4_0_rotated"].check_head(96)


@pytest.mark.parametrize("text", ["4", "4+", "4,128", "-4+128", "none"])
def test_exact_tokens_are_sinks_and_a_window(text):
    assert ExactTokens.parse("4+128") == ExactTokens(4, 128) and ExactTokens.parse("own") is None
    with pytest.raises(UsageError, match=r"write own, or sinks and window as in 4\+128$"):
        ExactTokens.parse(text)


def test_the_table_in_the_documents_has_every_format_with_its_bits():
    text = (Path(__file__).parents[3] / "docs" / "fidelity.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(\w+)` \| ([0-9.]+) \(([0-9.]+)\) \|", text, re.MULTILINE)
    bits = {name: tuple(f"{published.bits_per_element(n):.2f}" for n in (128, 64)) for name, published in PUBLISHED.items()}
    assert {name: tuple(shown) for name, *shown in table} == bits
