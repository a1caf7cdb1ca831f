"""Keys with a bias in one channel, as models with biased key projections have: per channel they survive, per token not."""

import pytest
import torch

from elastickv.evaluation.kv_formats.published_formats import PUBLISHED
from elastickv.evaluation.kv_formats.rotations import hadamard, random_rotation
from elastickv.evaluation.tensor_codecs import stored_rows

PER_CHANNEL = ("kivi4", "kvarn_k4v4_g128_plain", "fp8_per_channel_centered")
PER_TOKEN = (
    "int4_per_token_head",
    "int4_per_token_head_unrotated",
    "q4_0_rotated",
    "turboquant4",
    "turboquant4_qjl",
    "int8_per_token_head",
)


def attention_error(name, bias):
    """Return the error of attention's weights, relative to their size, with a bias in channel 5 of the keys.

    The query has no part in that channel, so that exact weights do not depend on the bias; it acts by rounding alone.
    """
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 1, 128, 64, generator=generator)
    query = torch.randn(1, 1, 16, 64, generator=generator)
    query[..., 5] = 0
    keys[..., 5] += bias
    plane = PUBLISHED[name].keys
    exact, rounded = ((query @ k.mT / 8).softmax(-1) for k in (keys, plane.round_trip(keys)))
    return float((rounded - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", PER_CHANNEL)
def test_keys_per_channel_do_not_notice_a_bias(name):
    errors = [attention_error(name, bias) for bias in (0, 1, 1e2, 1e3, 1e4)]
    assert max(errors) < 1.01 * errors[0] + 1e-6 and errors[0] < 0.15


@pytest.mark.parametrize("name", PER_TOKEN)
def test_keys_per_token_lose_everything_to_a_large_bias(name):
    errors = [attention_error(name, bias) for bias in (1, 1e4)]
    assert errors[0] < 0.7 and errors[1] > 0.7


@pytest.mark.parametrize("name", ["int4_per_token_head", "int4_per_token_head_unrotated", "q4_0_rotated", "turboquant4"])
def test_a_bias_of_a_hundred_is_enough_for_four_bits(name):
    assert attention_error(name, 100) > 5 * attention_error(name, 0) and attention_error(name, 100) > 0.5


def test_a_scale_a_channel_alone_keeps_a_bias_where_it_is():
    """A float has three bits of a number, and so of its bias: what varies on top of it is lost, in its channel alone."""
    x = torch.randn(1, 1, 128, 64, generator=torch.Generator().manual_seed(3))
    x[..., 5] += 1000
    scaled, centered, whole = (
        stored(x) - x
        for stored in (
            *(PUBLISHED[f"fp8_per_channel{name}"].keys.round_trip for name in ("", "_centered")),
            lambda keys: stored_rows(keys, "int8_per_channel", False, 64),
        )
    )
    assert scaled[..., 5].std() > 0.7 * x[..., 5].std() > 20 * centered[..., 5].std()
    assert scaled[..., :5].abs().max() < 0.3
    assert whole.norm() < 0.5 * centered.norm(), "at the same bytes"


def test_floats_lose_what_varies_on_top_of_a_bias_and_nothing_else():
    """The largest channel is exact, as the scale says it; the second largest varies by less than a step."""
    x = torch.randn(1, 1, 128, 64, generator=torch.Generator().manual_seed(2))
    x[..., 4] += 1000
    x[..., 5] += 700
    fp8, kivi = (PUBLISHED[name].keys.round_trip(x) for name in ("fp8_per_token_head", "kivi4"))
    assert (fp8 - x)[..., 5].std() > 0.7 * x[..., 5].std() and (kivi - x)[..., 5].std() < 0.3 * x[..., 5].std()
    assert (fp8 - x)[..., 6:].norm() < 0.05 * x[..., 6:].norm()


def test_rotations_are_orthogonal():
    for matrix in (hadamard(1), hadamard(64), hadamard(128), random_rotation(64), random_rotation(80)):
        torch.testing.assert_close(matrix @ matrix.mT, torch.eye(len(matrix)), rtol=0, atol=1e-5)
    assert torch.equal(hadamard(8), hadamard(8).mT) and not torch.equal(random_rotation(64, 1), random_rotation(64, 2))


def test_small_numbers_need_a_calibrated_scale_in_nvfp4():
    x = torch.randn(1, 1, 4, 64, generator=torch.Generator().manual_seed(1)) * 1e-3
    plain, calibrated = (PUBLISHED[name].keys for name in ("nvfp4", "nvfp4_calibrated"))
    assert not plain.read_back(x, plain.layer_scale(x)).any()
    assert (calibrated.read_back(x, calibrated.layer_scale(x)) - x).norm() < 0.15 * x.norm()
