"""The page format of each layer, by the options or a calibration, and the slab that all layers share."""

import hashlib
from dataclasses import replace

import pytest

from elastickv.errors import UsageError
from elastickv.recipe import HEAD_DIMS, AttentionShape, ModelCalibration, interval_bytes, predicted_loss
from elastickv.recipe.slab import Slab
from elastickv.vllm.layer_formats import (
    ServedModel,
    SlabPlan,
    at_ratio,
    calibration_hash,
    layer_recipes,
    read_calibration,
    selection_line,
    uncalibrated,
    with_calibration_hash,
)
from elastickv.vllm.serving_options import PAGE_FORMATS, ServingOptions, page_recipe

LAYERS, KV_HEADS, HEAD_DIM = 4, 2, 64
SHAPE = AttentionShape(1, 4, KV_HEADS, HEAD_DIM)
MODEL = ServedModel(SHAPE, LAYERS, context=32768)
INT4 = page_recipe("int4", 128)


def table(value):
    """Errors of all heads of a layer alike, larger in later layers."""
    return tuple((value * 10.0**layer,) * KV_HEADS for layer in range(LAYERS))


CALIBRATION = ModelCalibration(
    model="tiny",
    fingerprint="0123456789abcdef",
    layers=tuple(range(LAYERS)),
    query_heads=4,
    kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    text="a text",
    tokens=100,
    queries=10,
    pages={1: {f: table(1e-9 * (1 / f - 1)) for f in (1.0, 0.5, 0.25)}},
    keys={name: table(error) for name, error in (("int8", 1e-6), ("fp8", 2e-6), ("int4", 1e-4))},
    values={name: table(error) for name, error in (("int8", 1e-6), ("fp8", 2e-6), ("int4/32", 1e-4), ("int4/64", 2e-4))},
)


def options(**given):
    return ServingOptions.parse({"elastickv": given})


def recipes(layer_numbers=range(LAYERS), model=MODEL, default=INT4, **given):
    return layer_recipes(options(**given), default, layer_numbers, model)


def refusal(call):
    with pytest.raises(UsageError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "calibration.json"
    path.write_text(CALIBRATION.dumps(), encoding="utf-8")
    return str(path)


def test_without_options_every_layer_has_the_default():
    assert recipes() == dict.fromkeys(range(LAYERS), INT4)


def test_the_option_layers_overrides_the_default_in_the_layers_it_names():
    chosen = recipes(layers={"0": "int8", "2-3": "k8v4"})
    assert [chosen[layer].formats for layer in range(LAYERS)] == ["int8", "int4", "k=int8,v=int4", "k=int8,v=int4"]
    assert {recipe.window for recipe in chosen.values()} == {128}


def test_formats_of_layers_have_the_window_of_the_options():
    assert recipes(layers={"0": "int8"}, window=64)[0] == page_recipe("int8", 64)


def test_a_layer_that_the_model_lacks_is_refused_with_the_last_one():
    assert "names layer 4 and the model has 4: give layers from 0 to 3" in refusal(lambda: recipes(layers={"2-4": "int8"}))


def test_all_ranks_get_the_same_recipes(file):
    for given in ({"layers": {"3": "int8"}}, {"calibration": file, "compress": 3}, {"compress": 8}):
        assert recipes(range(2), **given) == recipes(range(2, 4), **given) == recipes(**given)


@pytest.mark.parametrize("ratio", [2, 2.5, 3])
def test_a_calibration_chooses_formats_that_meet_the_ratio_with_every_page_read(file, ratio):
    chosen = recipes(calibration=file, compress=ratio, select_pages=False)
    head = AttentionShape(1, 2, 1, HEAD_DIM)
    read = sum(interval_bytes(recipe, [MODEL.context], head).kv for recipe in chosen.values())
    assert LAYERS * MODEL.context * HEAD_DIM * 4 / read >= ratio
    assert {(recipe.selection, recipe.fractions, recipe.sinks, recipe.window) for recipe in chosen.values()} == {
        ("all", (), 0, 128)
    }


def read_by_heads(chosen):
    """Return the bytes that a step reads, all layers and KV heads together."""
    head = AttentionShape(1, 2, 1, HEAD_DIM)
    each = [
        replace(recipe, fractions=(recipe.fraction(number),)) if recipe.fractions else recipe
        for recipe in chosen.values()
        for number in range(KV_HEADS)
    ]
    return sum(interval_bytes(recipe, [MODEL.context], head).kv for recipe in each)


@pytest.mark.parametrize("given", [(), ("calibration",)])
@pytest.mark.parametrize("ratio", [6, 8])
def test_ratios_that_formats_do_not_reach_are_met_by_selected_pages(file, ratio, given):
    chosen = recipes(compress=ratio, **dict.fromkeys(given, file))
    assert read_by_heads(chosen) * ratio <= LAYERS * KV_HEADS * MODEL.context * HEAD_DIM * 4
    assert {(recipe.sinks, recipe.window) for recipe in chosen.values()} == {(0, 128)}
    assert "pages" in {recipe.selection for recipe in chosen.values()}


def test_without_a_calibration_all_layers_select_the_same_share_and_the_warning_says_so():
    given = options(compress=8)
    recipe, *others = set(recipes(compress=8).values())
    assert not others and recipe.formats == "int4" and len(recipe.fractions) == 1
    said = uncalibrated(given, recipe, MODEL)
    assert said.startswith(
        f"compress=8 without a calibration: all KV heads read the same share of pages; at 32768 tokens that is {recipe}"
    )
    assert f"expected loss {predicted_loss(recipe, HEAD_DIM):.3f}" in said and "\n" not in said


def test_the_log_says_what_decodes_read(file):
    chosen = recipes(calibration=file, compress=8)
    ratio = LAYERS * KV_HEADS * MODEL.context * HEAD_DIM * 4 / read_by_heads(chosen)
    assert selection_line(chosen, MODEL) == f"decodes read selected pages: 1/{ratio:.2f} of the dense bytes at 32768 tokens"


@pytest.mark.parametrize("name", ["int8", "k8v4", "fp8"])
def test_formats_whose_keys_have_no_bounds_do_not_select(name):
    message = refusal(lambda: recipes(default=page_recipe(name, 128), format=name, compress=8))
    assert "cannot be met" in message and "max_model_len" not in message
    assert message.endswith("; give a smaller `compress`, or a `format` whose pages can be selected: int4 or int8_per_channel")


def test_a_request_with_a_smaller_ratio_reads_larger_shares_that_meet_it(file):
    chosen, dense = recipes(calibration=file, compress=8), LAYERS * KV_HEADS * MODEL.context * HEAD_DIM * 4
    for ratio in (4, 6):
        assert ratio <= dense / read_by_heads(at_ratio(chosen, ratio, MODEL)) < 1.1 * ratio
    assert all(fraction == 1 for recipe in at_ratio(chosen, 2, MODEL).values() for fraction in recipe.fractions)


def test_layers_that_lose_more_get_the_finer_formats(file):
    chosen = recipes(calibration=file, compress=2.5, select_pages=False)
    sizes = [Slab.of(chosen[layer], HEAD_DIM).n_bytes for layer in range(LAYERS)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_a_ratio_that_formats_alone_cannot_meet_is_refused_with_the_largest(file):
    message = refusal(lambda: recipes(calibration=file, compress=16, select_pages=False))
    assert "stores cold tokens" in message or "cannot be met" in message


def test_a_context_within_the_window_meets_no_ratio(file):
    message = refusal(lambda: recipes(model=replace(MODEL, context=128), calibration=file, compress=2))
    assert "cannot be met at a context of 128" in message
    assert "larger `max_model_len`" in message and "sinks`" not in message


def test_the_option_layers_overrides_the_calibration(file):
    free = recipes(calibration=file, compress=3)
    bound = recipes(calibration=file, compress=3, layers={"0": "fp8"})
    assert bound == free | {0: page_recipe("fp8", 128)}


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (replace(MODEL, shape=AttentionShape(1, 8, 2, 64)), "is of tiny with 4 query heads, and this model has 8"),
        (replace(MODEL, shape=AttentionShape(1, 4, 4, 64)), "is of tiny with 2 KV heads, and this model has 4"),
        (replace(MODEL, shape=AttentionShape(1, 4, 2, 128)), "is of tiny with 64 channels a head, and this model has 128"),
        (replace(MODEL, layer_count=3), "with a layer 3, and this model has 3 layers"),
        (replace(MODEL, fingerprint="f" * 16), "is of tiny (fingerprint 0123456789abcdef)"),
    ],
)
def test_a_calibration_of_another_model_is_refused(file, model, said):
    message = refusal(lambda: recipes([0, 1, 2], model=model, calibration=file, compress=3))
    assert said in message and "run `elastickv calibrate`" in message


def test_a_calibration_of_this_model_is_accepted(file):
    known = replace(MODEL, fingerprint=CALIBRATION.fingerprint)
    assert recipes(model=known, calibration=file, compress=3) == recipes(calibration=file, compress=3)


def test_a_served_layer_that_was_not_calibrated_needs_a_format_of_its_own(file):
    longer = replace(MODEL, layer_count=6)
    message = refusal(lambda: recipes(range(6), model=longer, calibration=file, compress=3))
    assert "no errors of layer 4, which is served" in message and "option layers" in message
    assert recipes(range(4), model=longer, calibration=file, compress=3).keys() == set(range(4))
    assert recipes(range(6), model=longer, calibration=file, compress=3, layers={"4-5": "int8"})[5].formats == "int8"


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b"[" * 9999])
def test_a_file_that_is_no_calibration_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "c.json"
    path.write_bytes(content)
    assert str(path) in refusal(lambda: recipes(calibration=str(path), compress=3))


@pytest.mark.parametrize("call", [calibration_hash, lambda path: recipes(calibration=path, compress=3)])
def test_a_file_that_cannot_be_read_is_refused_in_one_line(tmp_path, call):
    for path in (tmp_path / "missing.json", tmp_path):
        assert f"calibration {path}" in refusal(lambda: call(str(path)))  # noqa: B023


def test_the_hash_is_that_of_the_content(file, tmp_path):
    copy = tmp_path / "copy.json"
    copy.write_text(CALIBRATION.dumps(), encoding="utf-8")
    assert calibration_hash(file) == calibration_hash(str(copy)) == hashlib.sha256(copy.read_bytes()).hexdigest()
    copy.write_text(replace(CALIBRATION, queries=11).dumps(), encoding="utf-8")
    assert calibration_hash(file) != calibration_hash(str(copy))


def test_the_configuration_gets_the_hash_of_its_calibration(file):
    config = {"elastickv": {"calibration": file, "compress": 3}, "other": 1}
    hashed = with_calibration_hash(config)
    assert hashed == {"elastickv": {"calibration": file, "compress": 3, "calibration_hash": calibration_hash(file)}, "other": 1}
    assert config == {"elastickv": {"calibration": file, "compress": 3}, "other": 1}
    assert with_calibration_hash(hashed) == hashed
    assert read_calibration(ServingOptions.parse(hashed)) == CALIBRATION


@pytest.mark.parametrize("config", [{}, {"other": 1}, {"elastickv": {"format": "int4"}}])
def test_a_configuration_without_a_calibration_stays_as_it_is(config):
    assert with_calibration_hash(config) == config
    assert read_calibration(ServingOptions()) is None


def test_a_file_that_changed_after_its_hash_was_taken_is_refused(file):
    hashed = with_calibration_hash({"elastickv": {"calibration": file, "compress": 3}})
    with open(file, "a", encoding="utf-8") as text:
        text.write(" ")
    for call in (with_calibration_hash, lambda config: read_calibration(ServingOptions.parse(config))):
        assert "is not the file that calibration_hash names" in refusal(lambda: call(hashed))  # noqa: B023


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_slab_holds_every_format_in_whole_16_bit_numbers_for_each_token(head_dim):
    shape = AttentionShape(1, 8, 2, head_dim)
    every = [page_recipe(name, 128) for name in PAGE_FORMATS]
    plan = SlabPlan.of(every, shape)
    sizes = [Slab.of(recipe, head_dim).n_bytes for recipe in every]
    assert max(sizes) <= plan.slab_bytes < max(sizes) + 128
    assert plan.slab_bytes % 128 == 0, "a line of a GPU's cache, and whole 16-bit numbers for each of 32 tokens"
    assert plan.page_bytes == plan.slab_bytes * len(every) * 2
    assert plan.wasted_bytes == plan.page_bytes - 2 * sum(sizes)


def test_layers_of_one_format_waste_nothing():
    plan = SlabPlan.of([INT4] * 32, AttentionShape(1, 32, 8, 128))
    assert (plan.slab_bytes, plan.wasted_bytes, plan.page_bytes) == (4736, 0, 4736 * 32 * 8)


def test_the_waste_is_said_in_bytes_and_as_a_share():
    plan = SlabPlan.of([page_recipe("int8", 128), INT4], AttentionShape(1, 4, 1, 128))
    assert str(plan) == ("slab 8,320 B a page and KV head; layers of smaller formats leave 3,584 of 16,640 B unused (21.5%)")


def test_a_calibration_with_values_in_3_bits_chooses_them_on_cpus_alone(tmp_path):
    path = tmp_path / "three.json"
    values = CALIBRATION.values | {"int3/32": table(1.01e-4), "int3/64": table(2.01e-4)}
    path.write_text(replace(CALIBRATION, values=values).dumps(), encoding="utf-8")
    chosen = {
        device: {
            recipe.value_format
            for recipe in recipes(calibration=str(path), compress=3, select_pages=False, model=model).values()
        }
        for device, model in ((device, replace(MODEL, device=device)) for device in ("cpu", "cuda", None))
    }
    assert "int3" in chosen["cpu"] and "int3" not in chosen["cuda"] | chosen[None]
