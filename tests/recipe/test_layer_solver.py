"""Recipes of a whole model: the budget goes to the layers and heads that lose most without it."""

import json
import random
from dataclasses import replace
from itertools import product

import pytest

from elastickv.errors import UsageError
from elastickv.recipe import DENSE, AttentionShape, Recipe, dense_bytes, interval_bytes, regions, stored_ratio
from elastickv.recipe.calibration import ModelCalibration
from elastickv.recipe.layer_solver import for_ratio_by_layer
from elastickv.recipe.regions import PAGE_TOKENS, selected

FRACTIONS = (1.0, 1 / 2, 1 / 4, 1 / 8)
LAYERS, KV_HEADS = 3, 2


def table(value):
    return tuple(tuple(value(layer, head) for head in range(KV_HEADS)) for layer in range(LAYERS))


def need(layer, head):
    return 10.0 ** (layer - head)


CALIBRATION = ModelCalibration(
    model="tiny",
    fingerprint="0123456789abcdef",
    layers=(0, 1, 3),
    query_heads=4,
    kv_heads=KV_HEADS,
    head_dim=64,
    text="a text",
    tokens=100,
    queries=10,
    pages={
        steps: {f: table(lambda layer, head, f=f, steps=steps: need(layer, head) * (1 / f - 1) * steps) for f in FRACTIONS}
        for steps in (1, 4)
    },
    keys={name: table(lambda *_, e=e: e) for name, e in (("int8", 1e-6), ("int4", 1e-4))},
    values={name: table(lambda *_, e=e: e) for name, e in (("int8", 1e-6), ("int4/32", 1e-4), ("int4/64", 3e-4))},
)
SHAPE = AttentionShape(1, 4, KV_HEADS, 64)


def ratio_of(recipes, context):
    return LAYERS * dense_bytes([context], SHAPE) / sum(interval_bytes(r, [context], SHAPE).kv for r in recipes)


@pytest.mark.parametrize("context", [2048, 32768])
@pytest.mark.parametrize("ratio", [2, 3, 4, 8])
def test_the_budget_is_kept_and_spent(ratio, context):
    plan = for_ratio_by_layer(CALIBRATION, ratio, context)
    assert plan.ratio == pytest.approx(ratio_of(plan.recipes, context))
    # At 2 and 3 formats change by whole layers, which read all pages; else what is left is less than a page.
    assert ratio <= plan.ratio < ratio * (1.3 if ratio < 4 else 1.004)
    for recipe in plan.recipes:
        recipe.check_shape(64, KV_HEADS)
        assert Recipe.parse(str(recipe)) == recipe


def test_formats_alone_meet_a_ratio_where_no_pages_may_be_selected():
    bound = for_ratio_by_layer(CALIBRATION, 3, 32768, select_pages=False)
    assert {recipe.selection for recipe in bound.recipes} == {"all"} and bound.ratio >= 3
    assert for_ratio_by_layer(CALIBRATION, 4, 32768).ratio >= 4
    with pytest.raises(UsageError, match="compress=4 cannot be met"):
        for_ratio_by_layer(CALIBRATION, 4, 32768, select_pages=False)


def test_no_choice_of_calibrated_fractions_errs_less_within_the_bytes():
    """A Lagrangian solution is the best of all that read no more than it does, and what it leaves is spent on more pages."""
    context, few = 4096, (1.0, 1 / 4)
    small = replace(
        CALIBRATION,
        layers=(0, 1),
        pages={1: {f: CALIBRATION.pages[1][f][:2] for f in few}},
        keys={"int4": CALIBRATION.keys["int4"][:2]},
        values={"int4/64": CALIBRATION.values["int4/64"][:2]},
    )
    plan = for_ratio_by_layer(small, 5, context)
    plain = Recipe("int4", "int4")
    options = [
        (plain, 0.0, None),
        *((replace(plain, selection="pages", fractions=pair), None, pair) for pair in product(few, repeat=2)),
    ]

    def error(layer, pair):
        return sum(4e-4 + (small.pages[1][pair[head]][layer][head] if pair else 0) for head in range(KV_HEADS))

    best = min(
        error(0, first[2]) + error(1, second[2])
        for first, second in product(options, repeat=2)
        if 2 * dense_bytes([context], SHAPE) / sum(interval_bytes(o[0], [context], SHAPE).kv for o in (first, second))
        >= plan.ratio - 1e-9
    )
    assert 0.9 * best < plan.error <= best * (1 + 1e-9)
    between = [fraction for recipe in plan.recipes for fraction in recipe.fractions if fraction not in few]
    assert len(between) == 1, "one head stops between its fractions"


@pytest.mark.parametrize("ratio", [4.5, 5, 6.7, 8, 11])
def test_more_pages_are_read_where_they_save_most_until_a_page_is_left(ratio):
    """Each head's error falls by need * steps / f^2 with its fraction: no head stops short while a less hungry one goes on."""
    context = 16384
    plan = for_ratio_by_layer(CALIBRATION, ratio, context, anchor_every=1)
    pages = regions(context, 4, 128).cold // PAGE_TOKENS
    page = interval_bytes(
        Recipe("int4", "int4", selection="pages", fractions=(1 / 2,)), [context], AttentionShape(1, 2, 1, 64)
    ).kv
    page = page / (pages / 2)
    budget = LAYERS * dense_bytes([context], SHAPE) / ratio
    used = sum(interval_bytes(recipe, [context], SHAPE).kv for recipe in plan.recipes)
    assert budget - 2 * page < used <= budget
    shares = [
        (need(layer, head), recipe.fraction(head)) for layer, recipe in enumerate(plan.recipes) for head in range(KV_HEADS)
    ]
    assert sum(share not in FRACTIONS for _, share in shares) <= 1
    assert [share for _, share in sorted(shares)] == sorted(share for _, share in shares)


def test_hungry_heads_get_the_pages_and_every_head_reads_one():
    plan = for_ratio_by_layer(CALIBRATION, 10, 4096, anchor_every=4)
    shares = [[recipe.fraction(head) for head in range(KV_HEADS)] for recipe in plan.recipes]
    flat = sorted((need(layer, head), shares[layer][head]) for layer in range(LAYERS) for head in range(KV_HEADS))
    assert [share for _, share in flat] == sorted(share for _, share in flat)
    assert flat[0][1] < flat[-1][1]
    pages = regions(4096, 4, 128).cold // PAGE_TOKENS
    assert all(selected(pages, share) >= 1 for row in shares for share in row)
    assert {recipe.anchor_every for recipe in plan.recipes if recipe.selection == "pages"} == {4}


def test_a_larger_ratio_never_errs_less():
    errors = [for_ratio_by_layer(CALIBRATION, ratio, 8192).error for ratio in (1, 2, 3, 4, 6, 8, 12)]
    assert errors == sorted(errors)


def stored_ratios(plan):
    return [stored_ratio(recipe, [1 << 20], SHAPE) for recipe in plan.recipes]


def test_who_asks_for_fewer_bytes_read_gets_fewer_stored():
    for ratio, least in ((2, 1.5), (4, 3), (8, 3)):
        shares = [1 / each for each in stored_ratios(for_ratio_by_layer(CALIBRATION, ratio, 32768))]
        assert sum(shares) / len(shares) <= 1 / least
        assert min(stored_ratios(for_ratio_by_layer(CALIBRATION, ratio, 32768, stored_by_layer=True))) >= least
    coarse = replace(CALIBRATION, values=CALIBRATION.values | {f"int4/{g}": table(lambda *_: 99.0) for g in (32, 64)})
    free = for_ratio_by_layer(coarse, 4, 32768, stored=1)
    assert {recipe.value_format for recipe in free.recipes} == {"int8"}
    assert free.error < for_ratio_by_layer(coarse, 4, 32768).error
    with pytest.raises(UsageError, match="no calibrated format stores"):
        for_ratio_by_layer(CALIBRATION, 4, 32768, stored=5)


def test_a_layer_that_loses_most_by_four_bits_stores_more_where_the_others_store_less():
    sensitive = table(lambda layer, _: 1e4 if layer == 0 else 1e-6)
    calibration = replace(CALIBRATION, values=CALIBRATION.values | {f"int4/{group}": sensitive for group in (32, 64)})
    together, alike = (for_ratio_by_layer(calibration, 4, 32768, stored=2.8, stored_by_layer=each) for each in (False, True))
    assert together.recipes[0].value_format == "int8" and together.recipes[1].value_format == "int4"
    assert {recipe.value_format for recipe in alike.recipes} == {"int4"}
    assert together.error < alike.error / 2


@pytest.mark.parametrize("ratio", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(8))
def test_a_limit_of_all_layers_together_never_errs_more_than_one_of_each_layer(seed, ratio):
    draw = random.Random(seed)
    formats = {"int8": 1e-4, "int4": 1e-2, "int3": 1e-1, "int2": 1.0}
    calibration = replace(
        CALIBRATION,
        pages={n: {f: table(lambda *_, f=f: (1 / f - 1) * 10 ** draw.uniform(-3, 0)) for f in FRACTIONS} for n in (1, 4)},
        keys={name: table(lambda *_, e=e: e * 10 ** draw.uniform(-2, 2)) for name, e in formats.items()},
        values={f"{n}/64": table(lambda *_, e=e: e * 10 ** draw.uniform(-2, 2)) for n, e in formats.items() if n != "int8"}
        | {"int8": table(lambda *_: 1e-4)},
    )
    together, alike = (
        for_ratio_by_layer(calibration, ratio, 16384, device="cpu", stored_by_layer=each) for each in (False, True)
    )
    assert together.error <= alike.error * (1 + 1e-9)


def test_recipes_have_the_group_that_was_calibrated_and_the_sinks_and_window_that_are_asked_for():
    narrow = replace(CALIBRATION, keys={"int4": CALIBRATION.keys["int4"]}, values={"int4/32": CALIBRATION.values["int4/32"]})
    for ratio in (3, 8):
        plan = for_ratio_by_layer(narrow, ratio, 8192, sinks=7, window=65)
        assert {(recipe.value_group, recipe.sinks, recipe.window) for recipe in plan.recipes} == {(32, 7, 65)}


def test_ratio_one_is_dense():
    assert for_ratio_by_layer(CALIBRATION, 1, 4096).recipes == (DENSE,) * LAYERS


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((64, 4096), "compress=64 cannot be met"), ((4, 200), "from a context of"), ((0.5, 4096), "compress=0.5")],
)
def test_a_budget_that_cannot_be_kept_is_refused(arguments, named):
    with pytest.raises(UsageError, match=named):
        for_ratio_by_layer(CALIBRATION, *arguments)


def test_an_anchor_that_was_not_calibrated_is_refused():
    with pytest.raises(UsageError, match="choose 1, 4"):
        for_ratio_by_layer(CALIBRATION, 8, 4096, anchor_every=3)


def test_a_calibration_file_round_trips(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(CALIBRATION.dumps(), encoding="utf-8")
    assert ModelCalibration.load(path) == CALIBRATION


def test_a_calibration_of_another_model_is_refused():
    CALIBRATION.check_model("0123456789abcdef")
    with pytest.raises(UsageError, match=r"is of tiny .* not of other .* `elastickv calibrate`"):
        CALIBRATION.check_model("fedcba9876543210", "other")
    with pytest.raises(UsageError, match=r"not of this model \(fedcba9876543210\)"):
        CALIBRATION.check_model("fedcba9876543210")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": "something"}, "no calibration"),
        ({"version": 2}, "version 2"),
        ({"layers": [0, 1]}, "2 layers of 2 KV heads"),
        ({"layers": []}, "damaged"),
        ({"pages": {}}, "fraction 1 and another"),
        ({"keys": {"int4": [[-1, 0]] * 3}}, "negative"),
        ({"keys": {"int4": [[float("nan"), 0]] * 3}}, "no figure"),
        ({"pages": {"1": {f: [[0, 0]] * 3 for f in ("1.0", "0.0")}}}, "a fraction that is not above 0 and at most 1"),
        ({"pages": {"1": {f: [[0, 0]] * 3 for f in ("1.0", "1.1")}}}, "a fraction that is not above 0 and at most 1"),
        ({"keys": None}, "damaged"),
        ({"values": {"int4/48": [[0, 0]] * 3}}, "no group of the 64 channels that are stored"),
        ({"tokens": "many"}, "damaged"),
    ],
)
def test_a_damaged_or_newer_file_is_refused_in_one_line(change, named):
    record = json.loads(CALIBRATION.dumps()) | change
    with pytest.raises(UsageError, match=named) as refusal:
        ModelCalibration.loads(json.dumps(record), "file.json")
    assert "file.json" in str(refusal.value)


@pytest.mark.parametrize("content", [b"\x80\x04pickle", b"", b"[1]", b"{}"])
def test_what_is_no_calibration_is_refused(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=str(path)):
        ModelCalibration.load(path)


def test_a_calibration_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"No such file.*; give a file that `elastickv calibrate` wrote"):
        ModelCalibration.load(tmp_path / "absent.json")


def test_a_calibration_file_has_a_line_for_every_layer_of_a_table():
    assert "[1e-06, 1e-06]" in {line.strip(" ,") for line in CALIBRATION.dumps().splitlines()}


def test_a_ratio_of_one_reads_everything_in_every_layer():
    plan = for_ratio_by_layer(CALIBRATION, 1, 4096)
    assert (plan.recipes, plan.ratio, plan.error) == ((DENSE,) * LAYERS, 1.0, 0.0)


THREE_BITS = replace(
    CALIBRATION, values=CALIBRATION.values | {f"int3/{n}": table(lambda *_, e=e: e) for n, e in ((32, 1.1e-4), (64, 3.1e-4))}
)


def test_values_in_3_bits_are_chosen_where_they_lose_little_and_every_kernel_of_the_device_reads_them():
    for ratio in (3, 4, 8):
        chosen = for_ratio_by_layer(THREE_BITS, ratio, 32768, device="cpu")
        assert "int3" in {recipe.value_format for recipe in chosen.recipes}
        assert chosen.error < for_ratio_by_layer(CALIBRATION, ratio, 32768).error
    assert for_ratio_by_layer(THREE_BITS, 3.7, 1 << 20, select_pages=False, device="cpu").ratio >= 3.7


@pytest.mark.parametrize("device", ["cuda", None])
@pytest.mark.parametrize("ratio", [2, 3, 4, 8])
def test_a_calibration_that_lists_a_format_without_a_kernel_gives_the_recipes_of_one_without_it(ratio, device):
    assert for_ratio_by_layer(THREE_BITS, ratio, 8192, device=device) == for_ratio_by_layer(CALIBRATION, ratio, 8192)
    assert for_ratio_by_layer(CALIBRATION, ratio, 8192, device="cpu") == for_ratio_by_layer(CALIBRATION, ratio, 8192)


def rotated_calibration(keys=1.0, values=1.0):
    """CALIBRATION with rotated int4 that errs so many times as plain int4, in the first layer only; the same in the others."""
    rotated = {
        "keys": {"int4+rotated": table(lambda layer, _: 1e-4 * (keys if layer == 0 else 1))},
        "values": {"int4/64+rotated": table(lambda layer, _: 3e-4 * (values if layer == 0 else 1))},
    }
    return replace(CALIBRATION, **{name: getattr(CALIBRATION, name) | errors for name, errors in rotated.items()})


def test_layers_are_rotated_where_that_errs_less_and_nowhere_else():
    only = {"keys": {"int4": None, "int4+rotated": None}, "values": {"int4/64": None, "int4/64+rotated": None}}

    def rotations(select_pages=False, **factors):
        full = rotated_calibration(**factors)
        small = replace(full, **{name: {each: getattr(full, name)[each] for each in only[name]} for name in only})
        plan = for_ratio_by_layer(small, 3, 32768, select_pages=select_pages)
        return [recipe.rotate for recipe in plan.recipes], plan.error

    assert rotations()[0] == ["", "", ""]
    assert rotations(values=0.95)[0] == ["", "", ""]  # within what another text changes
    assert rotations(keys=0.5)[0] == ["k", "", ""]
    assert rotations(values=0.5)[0] == ["v", "", ""]
    both, error = rotations(keys=0.5, values=0.5)
    assert both == ["kv", "", ""] and error == pytest.approx(LAYERS * KV_HEADS * 4e-4 - KV_HEADS * 2e-4)
    assert rotations(keys=2.0, values=2.0)[0] == ["", "", ""]


def test_keys_of_layers_that_select_pages_are_not_rotated():
    """The pages that a selection reads were measured as unrotated keys rank them."""
    plan = for_ratio_by_layer(rotated_calibration(keys=0.1, values=0.1), 8, 32768)
    assert plan.recipes[0].selection == "pages" and plan.recipes[0].rotate == "v"


def test_codes_are_chosen_by_hessians_where_that_errs_less_and_the_caches_can():
    """The first layer gains by it, rotated; the second loses; of the third it was not measured better."""
    factors = {0: 0.5, 1: 2.0, 3: 1.0}
    by_hessians = table(lambda layer, _: 1e-4 * factors[CALIBRATION.layers[layer]])
    rotated = table(lambda *_: 2e-4)
    full = replace(
        rotated_calibration(),
        keys={
            "int4": CALIBRATION.keys["int4"],
            "int4+gptq": by_hessians,
            "int4+rotated": rotated,
            "int4+rotated+gptq": rotated,
        },
        hessians={},
    )

    def roundings(calibration, **options):
        return [r.rounding for r in for_ratio_by_layer(calibration, 3, 32768, select_pages=False, **options).recipes]

    assert roundings(full, gptq=True) == ["gptq", "nearest", "nearest"]
    assert roundings(full) == roundings(replace(full, hessians=None), gptq=True) == ["nearest"] * 3
    assert {r.rotate for r in for_ratio_by_layer(full, 3, 32768, select_pages=False, gptq=True).recipes} == {""}


def test_a_calibration_with_rotations_comes_back_from_its_file_and_one_without_them_is_still_read():
    for calibration in (CALIBRATION, rotated_calibration(values=0.5)):
        assert ModelCalibration.loads(calibration.dumps()) == calibration
    assert {recipe.rotate for recipe in for_ratio_by_layer(CALIBRATION, 3, 32768).recipes} == {""}
