"""Our recipes as references: the numbers of the NumPy cache that defines them, their bytes, and their names."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from elastickv.errors import UsageError
from elastickv.evaluation.evaluate import EvaluationOptions, evaluate
from elastickv.evaluation.exact_tokens import ExactTokens
from elastickv.evaluation.format_paths import format_paths, reference_path
from elastickv.evaluation.kv_formats.own_formats import NamedRecipes, own_format
from elastickv.evaluation.kv_formats.published_formats import parse_formats
from elastickv.evaluation.kv_formats.rotations import rotated_rows
from elastickv.evaluation.recipes_by_ratio import Span
from elastickv.evaluation.subject import Subject
from elastickv.kvcache.gptq import hessian_text, layer_compensation
from elastickv.kvcache.hadamard import rotated
from elastickv.kvcache.quantize import stored_values
from elastickv.kvcache.reference import ReferenceCache
from elastickv.recipe import AttentionShape, Recipe, stored_bytes
from elastickv.recipe.calibration import StorageStatistics
from tests.evaluation.test_evaluate import TEXTS, Silent
from tests.helpers.tiny_models import tiny_llama

HEADS, TOKENS, PAGE = 2, 96, 32
RECIPES = (
    "int4",
    "int4,rotate=kv",
    "int4,vgroup=32,rotate=k",
    "k=int4,v=int3,rotate=kv",
    "k=int8_per_channel,v=int8",
    "k=int8_per_channel,v=int3,rotate=v",
    "k=int3,v=int2,rotate=kv",
    "int8,rotate=kv",
    "fp8",
    "k=bf16,v=int8",
)


def rows(case, channels=64, seed=0):
    x = np.random.default_rng(seed).standard_normal((HEADS, TOKENS, channels)).astype(np.float32)
    biases = np.float32(300) * (np.arange(channels) % 7 == 0)
    return {"random": x, "biased": x + biases, "small": x * np.float32(1e-3), "halves": np.round(8 * x) / np.float32(2)}[case]


def tensor(x):
    return torch.from_numpy(np.array(x, np.float32))


@pytest.mark.parametrize("channels", [64, 96])
@pytest.mark.parametrize("case", ["random", "biased", "small", "halves"])
@pytest.mark.parametrize("text", RECIPES)
def test_a_float32_model_gets_what_the_quantizers_make_of_its_own_numbers(text, case, channels):
    recipe = Recipe.parse(text)
    group = recipe.v_group(channels)
    reference = own_format(recipe, channels, "fp32")
    planes = ((reference.keys, recipe.key_format, "k"), (reference.values, recipe.value_format, "v"))
    for plane, fmt, letter in planes:
        x, turned = rows(case, channels), letter in recipe.rotate
        stored = [stored_values(rotated(head) if turned else head, fmt, letter == "v", group) for head in x]
        expected = np.stack([rotated(head) if turned else head for head in stored])
        if fmt == "bf16":
            expected = tensor(x).bfloat16().double().numpy()
        read = plane.read_back(tensor(x), None).numpy()
        # Another code would be a step away: at least 1/255 of a range. A rotation is undone in float32 here.
        tolerance = 1e-6 * np.abs(x).max() if turned else 0
        np.testing.assert_allclose(read, expected.astype(np.float32), rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", ["random", "biased"])
@pytest.mark.parametrize("text", RECIPES)
def test_a_16_bit_model_gets_what_its_cache_stores(text, case):
    recipe = replace(Recipe.parse(text), sinks=2, window=10)
    shape, length = AttentionShape(1, HEADS, HEADS, 64), TOKENS
    cache = ReferenceCache(shape, length, "bf16", recipe)
    keys, values = (tensor(rows(case, seed=seed)).bfloat16().float() for seed in (1, 2))
    cache.prefill(keys[None].numpy(), values[None].numpy(), np.array([length]))
    reference = own_format(recipe, 64, "bf16")
    assert reference.keys.stored_tokens(length, recipe.sinks) == reference.values.stored_tokens(length, recipe.sinks) == 64
    cold = slice(2, 2 + 64)
    for head in range(HEADS):
        stored = cache.stored(0, head)
        for plane, x, expected in ((reference.keys, keys, stored.cold_keys), (reference.values, values, stored.cold_values)):
            read = plane.read_back(x[None, :, cold], None)[0, head].numpy()
            np.testing.assert_allclose(read, expected, rtol=1e-7, atol=1e-6 * x.abs().max().item())


@pytest.mark.parametrize("channels", [32, 64, 96, 128])
def test_rows_are_rotated_bit_for_bit_as_by_every_backend(channels):
    x = rows("biased", channels)
    np.testing.assert_array_equal(rotated_rows(tensor(x)).numpy(), rotated(x))


def test_keys_that_are_rotated_are_smoothed_before():
    recipe, x = Recipe.parse("int8,rotate=k"), rows("random")
    smoothing = tuple(tuple((channel + head) % 5 - 2 for channel in range(64)) for head in range(HEADS))
    factors = np.exp2(np.array(smoothing, np.float32))[:, None]
    read = own_format(recipe, 64, "fp32", smoothing).keys.read_back(tensor(x)[None], None)[0].numpy()
    expected = np.stack([rotated(stored_values(rotated(head), "int8", False, 64)) for head in x * factors]) / factors
    np.testing.assert_allclose(read, expected, rtol=0, atol=1e-5)
    plain = own_format(Recipe.parse("int8"), 64, "fp32", smoothing).keys
    assert torch.equal(
        plain.read_back(tensor(x), None), own_format(Recipe.parse("int8"), 64, "fp32").keys.read_back(tensor(x), None)
    )


@pytest.mark.parametrize("text", ["int4", "int4,rotate=kv", "k=int4,v=int3,rotate=kv", "k=fp8,v=int8,rotate=v"])
def test_codes_are_chosen_by_hessians_as_in_a_cache(text):
    recipe = Recipe.parse(f"{text},rounding=gptq,sinks=0,window=0")
    mixed = np.random.default_rng(3).standard_normal((2, HEADS, 64, 64))
    hessians = [tuple(hessian_text(each.T @ each) for each in of) for of in mixed]
    compensation = layer_compensation(recipe, 64, StorageStatistics(None, *hessians))
    cache = ReferenceCache(AttentionShape(1, HEADS, HEADS, 64), TOKENS, "bf16", recipe, 0, compensation)
    keys, values = (tensor(rows("random", seed=seed)).bfloat16().float() for seed in (1, 2))
    cache.prefill(keys[None].numpy(), values[None].numpy(), np.array([TOKENS]))
    reference = own_format(recipe, 64, "bf16", None, compensation)
    for head in range(HEADS):
        stored = cache.stored(0, head)
        for plane, x, expected in ((reference.keys, keys, stored.cold_keys), (reference.values, values, stored.cold_values)):
            np.testing.assert_allclose(plane.read_back(x[None], None)[0, head].numpy(), expected, rtol=1e-6, atol=1e-5)
    with pytest.raises(UsageError, match="needs a calibration with Hessians"):
        own_format(recipe, 64, "bf16")


def test_heads_that_a_cache_pads_are_padded():
    recipe, x = Recipe.parse("int4,rotate=v"), rows("biased", 72)
    padded = np.pad(x, ((0, 0), (0, 0), (0, 8)))
    expected = np.stack([rotated(stored_values(rotated(head), "int4", True, 80)) for head in padded])[..., :72]
    read = own_format(recipe, 80, "fp32").values.read_back(tensor(x), None).numpy()
    np.testing.assert_allclose(read, expected, rtol=0, atol=1e-6 * np.abs(x).max())


@pytest.mark.parametrize("text", RECIPES)
def test_a_page_takes_the_bytes_that_the_recipe_counts(text):
    recipe, shape = Recipe.parse(text), AttentionShape(1, 1, 1, 64)
    many = 4 + 128 + 160 * PAGE  # whole sectors of every plane
    counted = own_format(recipe, 64, "fp32").stored_bytes(many, 64, 1, 1)
    assert counted == stored_bytes(recipe, [many], shape, "bf16")


@pytest.fixture(scope="module")
def subject():
    return Subject(tiny_llama(layers=3), None)


def test_a_reference_takes_the_bits_of_its_recipe(subject):
    span = Span(390, 10)
    for text in RECIPES:
        ours, reference = (path.figures for path in format_paths(subject, [text, f"reference:{text}"], None, span))
        assert (ours["stored_format"].pop("exact_dtype"), reference["stored_format"].pop("exact_dtype")) == ("bf16", "fp32")
        assert reference == ours
    # 64 channels: 8 bits, and a 16-bit scale for 64 channels.
    (int8,) = format_paths(subject, ["reference:int8"], ExactTokens(4, 64), span)
    assert int8.figures["stored_format"]["bits_per_element"] == 8.25 and int8.figures["stored_format"]["exact_keys"] == 80


def test_layers_may_have_recipes_of_their_own(subject):
    recipes = [Recipe.parse(text) for text in ("int8", "dense", "k=int8_per_channel,v=int8")]
    path = reference_path(subject, "reference:mixed", recipes, Span(390, 10))
    assert path.figures["recipes"] == ["int8", "dense", "k=int8_per_channel,v=int8"]
    assert path.figures["stored_format"]["bits_per_element"] == pytest.approx((8.25 + 16 + (9 + 8.25) / 2) / 3)
    for number, said in ((2, "has 2 recipes, and the model 3 layers"), (3, "begin its name with reference:")):
        with pytest.raises(UsageError, match=said):
            reference_path(subject, "reference:mixed" if number == 2 else "mixed", recipes[:number], Span(390, 10))


OPTIONS = EvaluationOptions(ratios=(), contexts=(400,), window_count=1, scored=4, needle_lengths=(), greedy_tokens=0)


def test_a_file_of_recipes_is_a_format(tmp_path):
    file = tmp_path / "mixed.json"
    layers = {"0": "int8", "1": "int4"}
    file.write_text(json.dumps({"format": "elastickv-recipes", "version": 1, "layers": layers}))
    names = parse_formats([f"reference:{file}", str(file), "reference:int8", "reference:int4", "reference:dense,bf16"])
    rows = {row["cache"]: row for row in evaluate(tiny_llama(), TEXTS, replace(OPTIONS, formats=names), None, Silent())["rows"]}
    mixed = rows[f"reference:{file}"]
    assert mixed["recipes"] == rows[str(file)]["recipes"] == ["int8", "int4"]
    assert rows["reference:int8"]["kl"]["mean"] < mixed["kl"]["mean"] < rows["reference:int4"]["kl"]["mean"]
    assert rows["reference:dense"]["kl"]["mean"] < 1e-9 < 1e-7 < rows["bf16"]["kl"]["mean"], "bf16 alone rounds what is exact"
    with pytest.raises(UsageError, match=r"is not of this model, whose layers with full attention are 0, 1, 2: name these$"):
        NamedRecipes.of(f"reference:{file}").by_layer("reference:mixed.json", [0, 1, 2])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "reference:int4,pages=1/4",
            r"^format reference:int4,pages=1/4 selects by 'pages', and a reference reads all tokens: ",
        ),
        ("reference:kivi2", r"^format reference:kivi2 is no recipe: published formats are references, write kivi2$"),
        ("reference:int5", r"^format int5 is unknown: choose all, "),
        ("reference:k=int3,v=int8_per_channel", r"^format int8_per_channel stores keys only"),
    ],
)
def test_what_cannot_be_a_reference_is_refused(name, said):
    with pytest.raises(UsageError, match=said) as error:
        parse_formats([name])
    assert "\n" not in str(error.value)


def test_a_reference_needs_no_kernel(subject):
    on_gpu = SimpleNamespace(**{name: getattr(subject, name) for name in ("model", "elastic", "shape", "dtype", "head_dim")})
    on_gpu.layers, on_gpu.calibration, on_gpu.device = subject.layers, None, "cuda"
    names = ["reference:k=int4,v=int3", "k=int4,v=int3"]
    assert [path.name for path in format_paths(on_gpu, names, None, Span(390, 10))] == names[:1]
