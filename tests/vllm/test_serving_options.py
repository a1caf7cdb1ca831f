"""Options of the backend in vLLM: what is accepted, and the one line that says why something is not."""

import json
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.errors import UsageError
from elastickv.recipe import Recipe
from elastickv.recipe.slab import Slab
from elastickv.vllm.serving_options import CACHE_DTYPES, LayerFormat, ServingOptions, page_recipe, recipe_of

SHA256 = "0123456789abcdef" * 4


def parse(**options):
    return ServingOptions.parse({"elastickv": options})


OPTIONS = (
    "format", "window", "prefix_reuse", "layers", "calibration", "compress", "calibration_hash", "select_pages",
)  # fmt: skip


def refusal(call):
    with pytest.raises(UsageError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("additional_config", [{}, {"other": {"format": "int4"}}, None, types.SimpleNamespace()])
def test_a_configuration_without_our_key_has_no_options(additional_config):
    assert ServingOptions.parse(additional_config) is None


def test_an_empty_object_is_all_defaults():
    assert parse() == ServingOptions(None, 128, "soft", (), None, None, None, True)


def test_every_option_is_read():
    options = parse(window=64, prefix_reuse="strict", layers={"4-7": "k8v4", "0": "int8"}, format="fp8")
    assert options == ServingOptions("fp8", 64, "strict", (LayerFormat(0, 0, "int8"), LayerFormat(4, 7, "k8v4")))
    options = parse(calibration="c.json", compress=3, calibration_hash=SHA256)
    assert (options.calibration, options.compress, options.calibration_hash) == ("c.json", 3.0, SHA256)
    assert not parse(calibration="c.json", compress=3, select_pages=False).select_pages


def test_options_survive_the_json_of_a_command_line():
    text = '{"elastickv": {"format": "int4", "window": 256, "layers": {"0": "int8"}}}'
    assert ServingOptions.parse(json.loads(text)) == parse(format="int4", window=256, layers={"0": "int8"})


@pytest.mark.parametrize("value", [None, "int4", 4, [], True])
def test_what_is_no_object_is_refused_with_an_example(value):
    assert 'give an object such as {"format": "int4"}' in refusal(lambda: ServingOptions.parse({"elastickv": value}))


@pytest.mark.parametrize(
    ("key", "suggestion"), [("windw", "window"), ("prefix-reuse", "prefix_reuse"), ("Format", "format"), ("layer", "layers")]
)
def test_an_unknown_option_is_refused_with_the_accepted_ones_and_the_nearest(key, suggestion):
    message = refusal(lambda: parse(**{key: 1}))
    assert f"has no option '{key}' (did you mean {suggestion}?)" in message
    assert message.endswith(f"it has {', '.join(OPTIONS)}")


@pytest.mark.parametrize("key", ["quality", "", 3, None])
def test_an_option_that_is_like_none_gets_no_suggestion(key):
    message = refusal(lambda: ServingOptions.parse({"elastickv": {key: 1}}))
    assert "did you mean" not in message and "it has format, window" in message


@pytest.mark.parametrize("window", [32, 33, 128, 4096])
def test_a_window_in_range_is_accepted(window):
    assert parse(window=window).window == window


@pytest.mark.parametrize("window", [31, 0, -128, 4097, 128.0, "128", True, None, [128], float("nan"), 10**400])
def test_another_window_is_refused_with_its_range(window):
    assert "give a whole number of tokens from 32 to 4096" in refusal(lambda: parse(window=window))


def test_a_number_that_cannot_be_written_is_refused_too():
    assert "option window is no usable int" in refusal(lambda: parse(window=10**9999))


@pytest.mark.parametrize("reuse", ["hard", "SOFT", "", True, None, ["soft"]])
def test_another_prefix_reuse_is_refused_with_both_choices(reuse):
    assert "give soft, strict" in refusal(lambda: parse(prefix_reuse=reuse))


@pytest.mark.parametrize("name", ["int3", "k=int8,v=int4", "bf16", "elastickv_int4", 4, None])
def test_another_format_is_refused_with_the_names(name):
    assert "give int4, int8, k8v4, fp8, int8_per_channel" in refusal(lambda: parse(format=name))
    assert "option layers[5] is" in refusal(lambda: parse(layers={"5": name}))


@pytest.mark.parametrize("layers", ["", "all", "-1", "3-", "7-4", "1,2", "1 - 2", "01", "1.0", "٣", "999999", 3, None])
def test_layers_are_a_number_or_an_ascending_range(layers):
    assert 'give a number or an ascending range, "3" or "4-7"' in refusal(lambda: parse(layers={layers: "int8"}))


@pytest.mark.parametrize("layers", [{}, "int8", ["int8"], None])
def test_the_layers_are_an_object(layers):
    assert 'give an object such as {"0": "int8", "4-7": "k8v4"}' in refusal(lambda: parse(layers=layers))


@pytest.mark.parametrize(
    ("layers", "twice"),
    [
        ({"4-7": "int8", "7": "int4"}, "layer 7 twice, by 4-7 and 7"),
        ({"5": "int8", "0-9": "int4"}, "layer 5 twice, by 0-9 and 5"),
        ({"0-3": "int8", "3-5": "int8"}, "layer 3 twice, by 0-3 and 3-5"),
        ({"2": "int8", "2-2": "int8"}, "layer 2 twice, by 2 and 2"),
    ],
)
def test_no_layer_is_named_twice(layers, twice):
    assert twice in refusal(lambda: parse(layers=layers))


@pytest.mark.parametrize("ratio", [1, 0.5, 0, -3, 1025, "3", True, None, float("nan"), float("inf")])
def test_another_ratio_is_refused_with_its_range(ratio):
    assert "give a number above 1 and at most 1024" in refusal(lambda: parse(calibration="c.json", compress=ratio))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"calibration": "c.json"}, "calibration needs compress too"),
        ({"compress": 3, "select_pages": False}, "select_pages=false needs compress and calibration too"),
        ({"format": "int4", "select_pages": False}, "select_pages=false needs compress and calibration too"),
        ({"calibration": "c.json", "compress": 3, "select_pages": 0}, "give true or false"),
        ({"calibration_hash": SHA256}, "calibration_hash needs calibration too"),
        ({"calibration": "c.json", "compress": 3, "format": "int4"}, "contradict each other"),
        ({"calibration": "", "compress": 3}, "give the path of a file"),
        ({"calibration": 3, "compress": 3}, "give the path of a file"),
        ({"calibration": "c.json", "compress": 3, "calibration_hash": "abc"}, "64 hex digits"),
        ({"calibration": "c.json", "compress": 3, "calibration_hash": SHA256.upper()}, "64 hex digits"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, said):
    assert said in refusal(lambda: parse(**options))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
KEYS = st.sampled_from(OPTIONS)


@given(st.dictionaries(KEYS | st.text(), JSON) | JSON)
def test_whatever_is_passed_there_are_options_or_one_line(value):
    try:
        options = ServingOptions.parse({"elastickv": value})
    except UsageError as error:
        lines = str(error).splitlines()
    else:
        lines = [str(options)]
        assert 32 <= options.window <= 4096
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("dtype", "key", "value"),
    [
        ("elastickv_int4", "int4", "int4"),
        ("elastickv_int8", "int8", "int8"),
        ("elastickv_k8v4", "int8", "int4"),
        ("elastickv_fp8", "fp8", "fp8"),
        ("elastickv_int8_per_channel", "int8_per_channel", "int8"),
    ],
)
def test_a_cache_dtype_names_the_formats_of_keys_and_values(dtype, key, value):
    recipe = recipe_of(None, dtype)
    assert (recipe.key_format, recipe.value_format) == (key, value)
    assert (recipe.sinks, recipe.window, recipe.selection) == (0, 128, "all")
    assert Recipe.parse(CACHE_DTYPES[dtype]).formats == recipe.formats


@pytest.mark.parametrize("name", ["int4", "int8", "k8v4", "fp8", "int8_per_channel"])
def test_the_option_format_means_the_same_as_the_cache_dtype(name):
    options = parse(format=name)
    assert recipe_of(options, "auto") == recipe_of(None, f"elastickv_{name}") == recipe_of(options, f"elastickv_{name}")


def test_the_window_of_the_recipe_is_the_option():
    assert recipe_of(parse(window=64), "elastickv_int8") == page_recipe("int8", 64)
    assert page_recipe("int8", 64).window == 64


def test_every_recipe_has_a_slab():
    assert len({Slab.of(recipe_of(None, dtype), 128).n_bytes for dtype in CACHE_DTYPES}) == 5


def test_a_ratio_alone_selects_among_pages_of_int4_and_a_format_may_be_named():
    assert recipe_of(parse(compress=8), "auto") == page_recipe("int4", 128)
    assert recipe_of(parse(compress=8, format="int8_per_channel"), "auto") == page_recipe("int8_per_channel", 128)


def test_with_a_calibration_the_format_need_not_be_said():
    options = parse(calibration="c.json", compress=3)
    assert recipe_of(options, "auto").formats == "int4"
    assert recipe_of(options, "elastickv_k8v4").formats == "k=int8,v=int4"


@pytest.mark.parametrize("options", [None, ServingOptions(), ServingOptions(layers=(LayerFormat(0, 0, "int8"),))])
def test_auto_without_a_format_is_refused_with_both_ways_to_say_it(options):
    message = refusal(lambda: recipe_of(options, "auto"))
    assert "the option format, one of int4, int8, k8v4, fp8, int8_per_channel" in message and "elastickv_int4" in message


def test_a_format_that_contradicts_the_cache_dtype_is_refused():
    message = refusal(lambda: recipe_of(parse(format="int8"), "elastickv_int4"))
    assert "`kv_cache_dtype=elastickv_int4` and the option format=int8" in message


@pytest.mark.parametrize("dtype", ["fp8", "bfloat16", "int4_per_token_head", "elastickv", "elastickv_k4v8", ""])
def test_a_cache_dtype_of_others_is_refused_with_ours(dtype):
    message = refusal(lambda: recipe_of(parse(format="int4"), dtype))
    assert "give elastickv_int4, elastickv_int8, elastickv_k8v4, elastickv_fp8, elastickv_int8_per_channel, or auto" in message
