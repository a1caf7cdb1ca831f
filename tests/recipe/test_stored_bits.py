"""A budget of stored bits: the formats that err least, layer by layer, within a mean of bits an element."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from elastickv.errors import UsageError
from elastickv.recipe import AttentionShape, Recipe, for_stored_bits, stored_bits, stored_bytes
from elastickv.recipe.byte_counts import page_bytes
from elastickv.recipe.calibration import ModelCalibration
from elastickv.recipe.slab import Slab

LAYERS, KV_HEADS, DIM = 4, 2, 64
SHAPE = AttentionShape(1, 4, KV_HEADS, DIM)


def errors(scale):
    """Errors of a format: layers differ by orders of magnitude, in another order for each format, and heads by half."""
    return tuple(tuple(scale * 10.0 ** -((layer * 3 + int(1e6 * scale)) % 4) * (1 + head / 2) for head in range(KV_HEADS))
                 for layer in range(LAYERS))  # fmt: skip


KEYS = {"int8": 3e-6, "int8_per_channel": 1e-6, "fp8": 9e-5, "int4": 5e-4, "int4+rotated": 2e-4, "int8+rotated": 2.9e-6}
VALUES = {"int8": 2e-6, "int4/32": 1.5e-4, "int4/64": 3e-4, "int4/64+rotated": 1e-4, "int3/64": 1.6e-3, "int3/64+rotated": 9e-4}
CALIBRATION = ModelCalibration(
    model="tiny", fingerprint="0123456789abcdef", layers=(0, 1, 3, 4), query_heads=4, kv_heads=KV_HEADS, head_dim=DIM,
    text="a text", tokens=100, queries=10, pages={1: {1.0: errors(0.0), 0.5: errors(1e-3)}},
    keys={name: errors(scale) for name, scale in KEYS.items()},
    values={name: errors(scale) for name, scale in VALUES.items()},
)  # fmt: skip
BITS = {"int8": 8.25, "int8_per_channel": 9.0, "fp8": 8 + 1 / 128, "int4": 5.0}
VALUE_BITS = {"int8": 8.25, "int4/32": 5.0, "int4/64": 4.5, "int3/64": 3.5}
BUDGETS = (4.25, 4.3, 4.375, 4.5, 4.75, 5, 5.5, 6.1, 7, 8, 8.3, 8.5, 9, 16)


def mean_bits(plan):
    return sum(stored_bits(recipe, DIM) for recipe in plan.recipes) / LAYERS


def table_error(table, name, layer):
    """The sum over heads, rotated only where that leaves at most 90 % of it."""
    plain, rotated = (sum(table.get(each, table[name])[layer]) for each in (name, f"{name}+rotated"))
    return rotated if rotated < 0.9 * plain else plain


def every_choice():
    """Yield (bits, error) of all choices of formats of all layers; of a layer, those that no other pair beats in both."""
    of_layers = []
    for layer in range(LAYERS):
        pairs = sorted(
            (
                (BITS[k] + VALUE_BITS[v]) / 2,
                table_error(CALIBRATION.keys, k, layer) + table_error(CALIBRATION.values, v, layer),
            )
            for k, v in product(BITS, VALUE_BITS)
        )
        of_layers.append([pair for number, pair in enumerate(pairs) if all(pair[1] < other[1] for other in pairs[:number])])
    for choice in product(*of_layers):
        yield sum(bits for bits, _ in choice) / LAYERS, sum(error for _, error in choice)


@pytest.fixture(scope="module")
def choices():
    return np.array(list(every_choice()))


@pytest.mark.parametrize("budget", BUDGETS)
def test_no_other_choice_within_the_budget_errs_less(budget, choices):
    plan = for_stored_bits(CALIBRATION, budget, device="cpu")
    assert plan.error == pytest.approx(choices[choices[:, 0] <= budget + 1e-9, 1].min(), rel=1e-12)
    assert mean_bits(plan) <= budget
    assert plan == for_stored_bits(ModelCalibration.loads(CALIBRATION.dumps()), budget, device="cpu")
    assert plan.ratio == pytest.approx(16 / mean_bits(plan), rel=1e-3)


def test_recipes_are_those_of_the_errors_read_every_page_and_have_the_sinks_and_window_that_are_wanted():
    for budget in BUDGETS:
        plan = for_stored_bits(CALIBRATION, budget, sinks=7, window=65, device="cpu")
        total = 0.0
        for layer, recipe in enumerate(plan.recipes):
            assert (recipe.selection, recipe.sinks, recipe.window) == ("all", 7, 65)
            assert Recipe.parse(str(recipe)) == recipe
            value = f"{recipe.value_format}/{recipe.v_group(DIM)}" if recipe.value_format != "int8" else "int8"
            key = recipe.key_format + "+rotated" * recipe.rotates_keys
            total += sum(CALIBRATION.keys[key][layer])
            total += sum(CALIBRATION.values[value + "+rotated" * recipe.rotates_values][layer])
        assert total == pytest.approx(plan.error)


@pytest.mark.parametrize("device", ["cpu", "cuda", None])
def test_more_bits_never_err_more(device):
    solved = [for_stored_bits(CALIBRATION, budget, device=device) for budget in BUDGETS if device == "cpu" or budget >= 4.75]
    assert all(before.error >= after.error for before, after in zip(solved, solved[1:], strict=False))
    assert len({plan.error for plan in solved}) > 5


def test_layers_that_lose_more_get_more_bits():
    needy = replace(
        CALIBRATION,
        keys={name: tuple(tuple(scale * 100.0**-layer for _ in range(KV_HEADS)) for layer in range(LAYERS))
              for name, scale in KEYS.items()},
        values={name: tuple((scale,) * KV_HEADS for _ in range(LAYERS)) for name, scale in VALUES.items()},
    )  # fmt: skip
    keys = [BITS[recipe.key_format] for recipe in for_stored_bits(needy, 5.5, device="cpu").recipes]
    assert keys == sorted(keys, reverse=True) and keys[0] > keys[-1]


def test_each_device_gets_formats_that_its_kernels_read():
    on_cpu = for_stored_bits(CALIBRATION, 4.5, device="cpu")
    assert "int3" in {recipe.value_format for recipe in on_cpu.recipes}
    for device in ("cuda", None):
        plan = for_stored_bits(CALIBRATION, 5, device=device)
        assert "int3" not in {recipe.value_format for recipe in plan.recipes} and mean_bits(plan) <= 5


@pytest.mark.parametrize(
    ("device", "least", "formats", "reader"),
    [
        ("cpu", 4.25, "k=int4,v=int3", "the CPU reads"),
        ("cuda", 4.75, "int4", "CUDA reads"),
        (None, 4.75, "int4", "both read"),
    ],
)
def test_too_few_bits_are_refused_with_the_least_there_is(device, least, formats, reader):
    with pytest.raises(UsageError, match=rf"stored_bits=4.2 is less .*{reader}.*: give {least} or more, which is {formats} "):
        for_stored_bits(CALIBRATION, 4.2, device=device)
    plan = for_stored_bits(CALIBRATION, least, device=device)
    assert mean_bits(plan) == least and {recipe.formats for recipe in plan.recipes} == {formats}


def test_keys_in_3_bits_leave_bits_to_the_layers_that_need_them():
    """At 4.25 bits every layer would have k=int4,v=int3; with keys in 3 bits some have better values and keys."""
    more = replace(CALIBRATION, keys=CALIBRATION.keys | {"int3": errors(2e-3)})
    plan, before = (for_stored_bits(calibration, 4.25, device="cpu") for calibration in (more, CALIBRATION))
    assert mean_bits(plan) <= 4.25 and plan.error < before.error
    assert {recipe.key_format for recipe in plan.recipes} > {"int3"} and len({r.formats for r in plan.recipes}) > 1
    with pytest.raises(UsageError, match=r"stored_bits=3\.7 is less .*: give 3\.75 or more, which is int3 "):
        for_stored_bits(more, 3.7, device="cpu")
    assert {recipe.formats for recipe in for_stored_bits(more, 3.75, device="cpu").recipes} == {"int3"}
    for device in ("cuda", None):
        assert "int3" not in {recipe.key_format for recipe in for_stored_bits(more, 5, device=device).recipes}


def test_the_least_that_a_refusal_names_is_accepted_where_it_has_many_digits():
    only = replace(CALIBRATION, keys={"fp8": CALIBRATION.keys["fp8"]}, values={"int4/64": CALIBRATION.values["int4/64"]})
    with pytest.raises(UsageError, match=r"give 6\.254 or more"):  # 6.25390625, rounded up
        for_stored_bits(only, 6.25)
    assert mean_bits(for_stored_bits(only, 6.254)) == 6.25390625


@pytest.mark.parametrize("bits", [0, -4.5, 16.5, float("nan"), float("inf"), True, "4.75", None])
def test_what_is_no_number_of_bits_is_refused_in_one_line(bits):
    with pytest.raises(UsageError, match=r"^`stored_bits`=.* above 0 and at most 16$"):
        for_stored_bits(CALIBRATION, bits)


def test_a_budget_of_decimals_is_met_as_it_is_written():
    """Two layers of four with 8.25 bits of K more than 5: the mean is 4.75 + 1.625 / 2."""
    for budget in (4.3, 5.5625, 6.1):
        assert mean_bits(for_stored_bits(CALIBRATION, np.float64(budget), device="cpu")) <= budget
    exactly = replace(
        CALIBRATION,
        keys={"int8": errors(1e-6), "int4": errors(5e-4)},
        values={"int4/64": errors(3e-4)},
    )
    assert mean_bits(for_stored_bits(exactly, 5.5625)) == 5.5625


RECIPES = (
    "int4",
    "int4,vgroup=32",
    "k=int4,v=int3,rotate=kv",
    "int8",
    "fp8",
    "k=int8_per_channel,v=fp8",
    "k=fp8,v=bf16",
    "bf16",
)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("text", RECIPES)
def test_bits_are_those_of_the_bytes_that_a_page_adds(text, head_dim):
    recipe, shape = Recipe.parse(text), AttentionShape(1, 4, KV_HEADS, head_dim)
    pages = 1 << 14  # whole sectors of every plane
    grown = stored_bytes(recipe, [132 + 64 * pages], shape) - stored_bytes(recipe, [132 + 32 * pages], shape)
    assert grown == pages * KV_HEADS * page_bytes(recipe, head_dim)
    assert stored_bits(recipe, head_dim) == 8 * page_bytes(recipe, head_dim) / (64 * head_dim)
    if "fp8" not in text:  # whose one scale a page a slab pads to 16 bytes
        assert Slab.of(recipe, head_dim).n_bytes == page_bytes(recipe, head_dim)


def test_a_dense_layer_has_16_bits_and_a_stride_its_share():
    assert stored_bits(Recipe.parse("dense"), 128) == 16
    assert stored_bits(Recipe.parse("int8,stride=4"), 64) == 8.25 / 4
    with pytest.raises(ValueError, match="no pages"):
        page_bytes(Recipe.parse("dense"), 128)
