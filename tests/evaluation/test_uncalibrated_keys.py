"""Without a calibration, an evaluation measures the recipes that a cache chooses by the keys of a prompt."""

import warnings

import pytest
import torch

import elastickv.transformers as ekv
from elastickv.benchmark.reporter import SILENT
from elastickv.evaluation.evaluate import evaluate
from elastickv.evaluation.evaluation_options import EvaluationOptions
from elastickv.evaluation.texts import Text
from elastickv.transformers.model_loading import Loaded
from tests.helpers.model_matrix import VOCABULARY, model, prompt
from tests.helpers.tiny_models import TEXT, CharacterTokenizer

RATIO, BIASED, TOKENS = 1.6, 1, 1500
WINDOWS = EvaluationOptions(
    ratios=(RATIO, 4.0), contexts=(TOKENS,), window_count=2, scored=8, needle_lengths=(), greedy_tokens=0
)
TASKS = EvaluationOptions(ratios=(RATIO,), contexts=(), needle_lengths=(TOKENS,), needle_depths=1, greedy_tokens=0)


@pytest.fixture(scope="module")
def biased():
    """A model whose second layer has a bias of 400 in a slow rotary channel of its first KV head."""
    made = model("qwen2")
    with torch.no_grad():
        made.model.layers[BIASED].self_attn.k_proj.bias[62] = 400
    return Loaded("biased", made, CharacterTokenizer(VOCABULARY))


def recipes_of_a_cache(made):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = ekv.ElasticCache.for_model(made, RATIO, context=TOKENS)
        with torch.no_grad():
            made(**prompt(1, TOKENS), past_key_values=cache)
    made.set_attn_implementation("sdpa")
    return [cache.recipes[layer].key_format for layer in sorted(cache.recipes)]


@pytest.fixture(scope="module")
def result(biased):
    with pytest.warns(
        ekv.KeyFormatWarning, match=f"compress={RATIO} .* keys of layers {BIASED}, which get k=int8_per_"
    ) as said:
        made = evaluate(biased, [Text("text", TEXT)], WINDOWS, None, SILENT)
    assert len([each for each in said if each.category is ekv.KeyFormatWarning]) == 1
    return made


def test_the_formats_are_those_of_a_cache(biased, result):
    (row,) = [row for row in result["rows"] if row["compress"] == RATIO]
    formats = [recipe.partition(",")[0].removeprefix("k=") for recipe in row["recipes"]]
    assert formats == recipes_of_a_cache(biased.model) == ["int8", "int8_per_channel"]
    assert row["read_ratio"] >= RATIO


def test_the_loss_is_not_that_of_a_scale_for_each_token(biased, result):
    options = EvaluationOptions(**{**vars(WINDOWS), "ratios": (), "formats": ("int8",)})
    per_token = evaluate(biased, [Text("text", TEXT)], options, None, SILENT)["rows"][0]
    (row,) = [row for row in result["rows"] if row["compress"] == RATIO]
    assert row["kl"]["mean"] < per_token["kl"]["mean"] / 10


def test_pass_keys_alone_show_the_keys_too(biased):
    with pytest.warns(ekv.KeyFormatWarning):
        evaluate(biased, [Text("text", TEXT)], TASKS, None, SILENT)
