"""Without a calibration, the prompt's own keys decide between a scale for each token and one for each channel."""

import warnings

import numpy as np
import pytest
import torch

import elastickv.transformers as ekv
from elastickv.kvcache.key_scales import key_loss, unsuited_loss
from elastickv.kvcache.rounding import rounded
from elastickv.recipe import AttentionShape, Recipe, for_ratio, read_ratio
from elastickv.recipe.solver import PER_CHANNEL
from elastickv.transformers.layer_tokens import SAMPLED_PAGES, SAMPLED_ROWS, sampled_keys
from tests.helpers.model_matrix import model, padded, prompt

INPUTS = prompt(1, 500)


@pytest.fixture(scope="module")
def biased():
    """A model whose second layer has a bias of 400 in a slow rotary channel of its first KV head."""
    made = model("qwen2")
    with torch.no_grad():
        made.model.layers[1].self_attn.k_proj.bias[62] = 400
    return made


@pytest.fixture(autouse=True)
def quiet(biased):
    biased.set_attn_implementation("sdpa")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ekv.UncalibratedWarning)
        yield


def filled(made, inputs=INPUTS, compress=1.8, **options):
    cache = ekv.ElasticCache.for_model(made, compress, **options)
    with torch.no_grad():
        made(**inputs, past_key_values=cache)
    return cache


def logits(made, cache):
    with torch.no_grad():
        return made(input_ids=torch.tensor([[5]]), past_key_values=cache).logits[0, -1]


def test_a_layer_with_biased_keys_gets_scales_of_channels_and_the_others_stay(biased):
    message = (
        r"^compress=1.8 without a calibration: the keys of layer 1 lose [0-9.]+% of their variance in int8 and [0-9.]+% in "
        r"int4 per channel, so that layers of such keys get k=int8_per_channel,v=\w+ instead of int8; .*elastickv calibrate$"
    )
    with pytest.warns(ekv.KeyFormatWarning, match=message) as caught:
        cache = filled(biased)
    assert len([each for each in caught if each.category is ekv.KeyFormatWarning]) == 1
    assert [cache.recipes[layer].key_format for layer in (0, 1)] == ["int8", "int8_per_channel"]
    report = cache.report()
    assert report.by_keys == (1,) and report.recipes == cache.recipes
    assert "keys per channel, because a scale for each token does not suit the prompt's: layers 1" in str(report)
    assert cache.layers[1].store.cache.recipe == cache.recipes[1]


@pytest.mark.filterwarnings("ignore::elastickv.transformers.config.KeyFormatWarning")
def test_the_chosen_formats_predict_what_the_full_cache_does(biased):
    exact, chosen = logits(biased, filled(biased, compress=1)), logits(biased, filled(biased))
    per_token = logits(biased, filled(biased, compress=None, recipe="int8"))
    assert (chosen - exact).abs().max() < (per_token - exact).abs().max() / 3


@pytest.mark.filterwarnings("ignore::elastickv.transformers.config.KeyFormatWarning")
def test_the_choice_is_saved_and_forgotten_with_the_prompt(biased, tmp_path):
    cache = filled(biased)
    cache.save(tmp_path / "cache")
    loaded = ekv.ElasticCache.load(tmp_path / "cache", biased)
    assert loaded.recipes == cache.recipes and loaded.report().by_keys == (1,)
    torch.testing.assert_close(logits(biased, loaded), logits(biased, cache))
    cache.reset()
    assert cache.recipes == {} and cache.report().by_keys == ()
    filled_again = filled(biased)
    assert filled_again.report().by_keys == (1,)


@pytest.mark.parametrize("options", [{"recipe": "int8", "compress": None}, {"layers": {1: "int8"}}, {"compress": 4}])
def test_what_is_given_or_has_scales_of_channels_is_left_as_it_is(biased, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", ekv.KeyFormatWarning)
        cache = filled(biased, **options)
    assert cache.report().by_keys == ()
    assert "int8_per_channel" not in {recipe.key_format for recipe in cache.recipes.values()}


def test_keys_without_a_bias_keep_the_recipe_that_was_solved():
    with warnings.catch_warnings():
        warnings.simplefilter("error", ekv.KeyFormatWarning)
        cache = filled(model("qwen2"), padded([500, 300]))
    assert {recipe.key_format for recipe in cache.recipes.values()} == {"int8"}


@pytest.mark.filterwarnings("ignore::elastickv.transformers.config.KeyFormatWarning")
@pytest.mark.parametrize(
    "inputs",
    [padded([500, 300]), padded([500, 30]), padded([500, 5]), padded([3, 500, 4]), prompt(2, 80), prompt(1, 31), prompt(1, 10)],
    ids=[
        "padded",
        "a row of less than a page",
        "a row of 5",
        "the longest second",
        "within the window",
        "31 tokens",
        "10 tokens",
    ],
)
def test_padding_and_short_prompts_do_not_hide_the_bias(biased, inputs):
    assert filled(biased, inputs, recipe="auto").report().by_keys == (1,)


@pytest.mark.filterwarnings("ignore::elastickv.transformers.config.KeyFormatWarning")
def test_a_short_first_chunk_does_not_hide_the_bias(biased):
    cache = filled(biased, prompt(1, 16))
    with torch.no_grad():
        biased(input_ids=prompt(1, 300)["input_ids"], past_key_values=cache)
    assert cache.report().by_keys == (1,)


@pytest.mark.parametrize("compress", [1.2, 1.8, 1.9, 2, 2.3, 3, 4, 8])
def test_recipes_for_biased_keys_meet_the_ratio(compress):
    shape = AttentionShape(1, 8, 2, 128)
    recipe = for_ratio(compress, 4096, shape, key_formats=PER_CHANNEL)
    assert recipe.key_format in PER_CHANNEL
    assert read_ratio(recipe, [4096], shape) >= compress


@pytest.mark.parametrize("bias", [0, 1, 10, 100, 1e3, 1e4])
def test_eight_bits_a_token_are_given_up_where_four_bits_a_channel_lose_less(bias):
    """A bias that all tokens have says nothing; it takes the precision of the channels beside it."""
    keys = np.random.default_rng(3).standard_normal((2, 320, 64)).astype(np.float32)
    keys[1, :, 9] += bias
    keys = rounded(keys, "bf16")
    losses = unsuited_loss(keys, "int8", "int4")
    assert (losses is not None) == (bias >= 100)
    if losses is not None:
        assert losses[0] == key_loss(keys[1], "int8") > losses[1] == key_loss(keys[1], "int4")
    assert unsuited_loss(keys, "int8_per_channel", "int4") is None
    assert unsuited_loss(keys[:1], "int8", "int4") is None
    assert unsuited_loss(keys[:, :31], "int8", "int4") is None


def test_channels_that_hardly_vary_and_heads_that_are_not_finite_decide_nothing():
    keys = rounded(np.random.default_rng(4).standard_normal((1, 320, 64)), "bf16")
    keys[..., ::4] *= np.float32(1e-4)
    keys[..., 1] = 0
    assert unsuited_loss(keys, "int8", "int4") is None
    assert unsuited_loss(np.zeros_like(keys), "int8", "int4") is None
    keys[0, 5, 5] = np.nan
    assert unsuited_loss(keys, "int8", "int4") is None


def test_the_sample_is_of_whole_cold_pages_of_the_longest_rows():
    rows = torch.arange(6 * 2 * 3000).reshape(6, 2, 3000, 1).to(torch.float64).expand(-1, -1, -1, 4).to(torch.float16) * 0
    rows = rows + torch.arange(3000)[:, None] % 2048
    sample = sampled_keys(rows, np.array([3, 2000, 40, 2000, 1, 2000]), Recipe.parse("int8"))
    assert sample.shape == (2, SAMPLED_ROWS * SAMPLED_PAGES * 32, 4)
    first = sample[0, : SAMPLED_PAGES * 32, 0].reshape(-1, 32)
    assert ((first - first[:, :1]) == np.arange(32)).all()
    assert first[0, 0] == 4 and (first[:, 0] - 4 >= 0).all() and ((first[:, 0] - 4) % 32 == 0).all()
    assert first.max() < 2000 - 128


def test_a_row_without_a_page_repeats_its_tokens_and_a_shorter_one_has_no_sample():
    rows = torch.arange(100.0).reshape(1, 1, 100, 1).expand(2, 2, -1, 4)
    sample = sampled_keys(rows, np.array([3, 12]), Recipe.parse("int8"))
    np.testing.assert_array_equal(sample[0, :, 0], np.arange(32) % 12)
    assert sampled_keys(rows, np.array([3, 7]), Recipe.parse("int8")).shape == (2, 0, 4)
