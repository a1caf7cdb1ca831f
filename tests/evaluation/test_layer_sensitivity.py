"""What one layer's keys or values in 4 bits change of the predictions, and what a calibration and the solver make of it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from elastickv.errors import UsageError
from elastickv.evaluation import sessions
from elastickv.evaluation.calibrate import calibrate
from elastickv.evaluation.kv_formats.own_formats import own_format
from elastickv.evaluation.prefill import prefill
from elastickv.evaluation.sensitivity.layer_sensitivity import SCORED, RoundedLayer, layer_losses
from elastickv.evaluation.tensor_codecs import stored_rows
from elastickv.evaluation.texts import Text
from elastickv.kvcache.gptq import hessian_of, layer_compensation
from elastickv.recipe import AttentionShape, ModelCalibration, Recipe, for_ratio_by_layer, for_stored_bits, stored_bits
from elastickv.recipe.byte_counts import interval_bytes
from elastickv.recipe.calibration import SENSITIVITY_FORMATS, sensitivity_errors
from elastickv.transformers.cache_argument import CACHE_ARGUMENT
from tests.helpers.tiny_models import TEXT, tiny_llama

ROW = tuple(map(ord, TEXT[:500]))


@pytest.fixture(scope="module")
def loaded():
    """The second layer writes a tenth of what the first one writes."""
    made = tiny_llama()
    with torch.no_grad():
        made.model.model.layers[1].self_attn.o_proj.weight *= 0.1
    return made


@pytest.fixture(scope="module")
def calibration(loaded):
    return calibrate(loaded, Text("letters", TEXT), 1000)


@pytest.fixture(scope="module")
def storage(calibration):
    """How the calibration's layers are stored."""
    made = {}
    for layer in calibration.layers:
        known = calibration.statistics_of(layer)
        texts = (known.key_hessians, known.value_hessians)
        hessians = [torch.tensor(np.array([hessian_of(text, 64) for text in of_heads])).float() for of_heads in texts]
        made[layer] = RoundedLayer(known.smoothing, hessians)
    return made


def read_back(rows, fmt, of_values, known):
    """What cold rows become in a format, by the functions that references have; `known` is of the layer."""
    if not fmt.endswith("+gptq"):
        return stored_rows(rows, fmt, of_values, 64)
    recipe = Recipe.parse(f"{fmt.partition('+')[0]},rotate=kv,rounding=gptq")
    stored = own_format(recipe, 64, "fp32", known.smoothing, layer_compensation(recipe, 64, known))
    return (stored.values if of_values else stored.keys).round_trip(rows)


def loss_of(model, layer, of_values, fmt, known):
    """Without a prefill or a session of ours: the whole text once, then its last tokens after an edited cache."""
    first, ids = len(ROW) - SCORED, torch.tensor([ROW])
    predicted = []
    with torch.inference_mode():
        for edited in (False, True):
            cache = DynamicCache()
            model(input_ids=ids[:, :first], **{CACHE_ARGUMENT: cache})
            rows = cache.layers[layer].values if of_values else cache.layers[layer].keys
            if edited:
                cold = slice(4, 4 + (first - 4 - 128) // 32 * 32)
                rows[:, :, cold] = read_back(rows[:, :, cold], fmt, of_values, known)
            logits = model(input_ids=ids[:, first:], **{CACHE_ARGUMENT: cache}).logits[0]
            predicted.append(logits.double().log_softmax(-1))
    exact, other = predicted
    return float((exact.exp() * (exact - other)).sum(-1).mean())


def test_each_loss_is_that_of_one_tensor_of_one_layer(loaded, calibration, storage):
    losses = layer_losses(loaded.model, [ROW], storage)
    for changed, fmt in SENSITIVITY_FORMATS.items():
        for layer, loss in enumerate(losses[changed]):
            expected = loss_of(loaded.model, layer, changed.startswith("values"), fmt, calibration.statistics_of(layer))
            assert loss == pytest.approx(expected, rel=1e-3), changed
    assert len({losses[name] for name in SENSITIVITY_FORMATS}) == len(SENSITIVITY_FORMATS), "each is measured in its own format"
    twice = layer_losses(loaded.model, [ROW, ROW], storage)
    assert all(twice[tensor] == pytest.approx(losses[tensor]) for tensor in losses)


def test_the_loss_of_a_layers_pages_is_that_of_a_cache_that_selects_in_it_alone(loaded, storage):
    """The cache stores them in 8 bits, which loses next to nothing beside seven eighths of the pages."""
    first, ids = len(ROW) - SCORED, torch.tensor([ROW])
    losses = layer_losses(loaded.model, [ROW], storage)["pages"]
    start = prefill(loaded.model, [ROW], first, SCORED)
    with torch.inference_mode():
        exact = loaded.model(input_ids=ids).logits[0, first:].double().log_softmax(-1)
    for layer, loss in enumerate(losses):
        recipes = [Recipe.parse("dense")] * 2
        recipes[layer] = Recipe.parse("k=int8_per_channel,v=int8,pages=1/8,anchor_every=1")
        with sessions.elastic(loaded.model, recipes, start, SCORED) as session:
            steps = [session.step(ids[:, n])[0] for n in range(first, len(ROW))]
        other = torch.stack(steps).double().log_softmax(-1)
        assert loss == pytest.approx(float((exact.exp() * (exact - other)).sum(-1).mean()), rel=0.05)
    assert losses[0] > 10 * losses[1] > 0


def test_a_calibration_says_what_a_unit_of_error_costs_and_keeps_it_in_its_file(loaded, calibration, storage):
    losses = layer_losses(loaded.model, [tuple(map(ord, TEXT[:1000]))], storage)
    measured = {"keys": calibration.keys["int4"], "values": calibration.values["int4/64"], "pages": calibration.pages[1][1 / 8]}
    measured |= {"keys/int2": calibration.keys["int2"], "values/int2": calibration.values["int2/64"]}
    for bits in ("int4", "int2"):
        measured[f"keys/{bits}+rotated+gptq"] = calibration.keys[f"{bits}+rotated+gptq"]
        measured[f"values/{bits}+rotated+gptq"] = calibration.values[f"{bits}/64+rotated+gptq"]
    assert measured.keys() == calibration.sensitivity.keys()
    for tensor, errors in measured.items():
        factors = [loss / sum(row) for loss, row in zip(losses[tensor], errors, strict=True)]
        # A file's Hessians are rounded, which flips a code here and there.
        assert calibration.sensitivity[tensor] == pytest.approx(factors, rel=2e-2 if tensor.endswith("+gptq") else 1e-4)
    assert ModelCalibration.loads(calibration.dumps()) == calibration
    older = replace(calibration, sensitivity=None)
    assert "sensitivity" not in json.loads(older.dumps()) and ModelCalibration.loads(older.dumps()) == older


def test_rounding_to_16_bits_hides_a_layers_loss_so_that_none_is_measured():
    half = tiny_llama()
    half.model.bfloat16()
    assert calibrate(half, Text("letters", TEXT), 800).sensitivity is None


def test_errors_in_nats_are_those_times_the_sensitivity_of_their_layer(calibration):
    sensitivity = {name: calibration.sensitivity[name] for name in ("keys", "values", "pages")}
    weighed = replace(calibration, sensitivity=sensitivity).in_nats()
    tables = [(tensor, getattr(calibration, tensor), getattr(weighed, tensor)) for tensor in ("keys", "values")]
    tables += [("pages", calibration.pages[steps], weighed.pages[steps]) for steps in calibration.pages]
    for tensor, before, after in tables:
        for name, rows in before.items():
            for row, other, factor in zip(rows, after[name], sensitivity[tensor], strict=True):
                assert other == pytest.approx([factor * error for error in row])
    assert weighed.in_nats() is weighed


def test_a_loss_that_grows_faster_than_its_error_is_a_power_of_it_between_4_and_2_bits(calibration):
    """With sensitivities 1 at `int4` and 8 at `int2`, whose error is 16 times larger: the factor is error^0.75."""
    table = {"int8": 0.1, "int4": 1.0, "int3": 4.0, "int2": 16.0, "int2+rotated": 20.0}
    keys = {name: ((error / 2, error / 2), (error / 4, 3 * error / 4)) for name, error in table.items()}
    even = dict.fromkeys(("keys", "values", "values/int2"), (1.0, 1.0))
    weighed = replace(calibration, keys=keys, sensitivity=even | {"keys/int2": (8.0, 0.5)}).in_nats()
    losses = {name: [sum(row) for row in rows] for name, rows in weighed.keys.items()}
    expected = {"int8": 0.1, "int4": 1.0, "int3": 4 * 4**0.75, "int2": 16 * 8, "int2+rotated": 20 * 8}
    assert {name: row[0] for name, row in losses.items()} == pytest.approx(expected)
    assert {name: row[1] for name, row in losses.items()} == pytest.approx(table), "a loss that grows slower is taken as it is"
    assert weighed.keys["int3"][1][1] == pytest.approx(3 * weighed.keys["int3"][1][0])


def test_errors_that_hessians_leave_have_sensitivities_of_their_own(calibration):
    """Ten times those of the nearest codes in both formats, so that formats by Hessians weigh ten times as much."""
    few = dict.fromkeys(("keys", "values", "pages"), (1.0, 1.0))
    own = {name: (10.0, 10.0) for name in SENSITIVITY_FORMATS if name.endswith("+gptq")}
    without, weighed = (replace(calibration, sensitivity=each).in_nats() for each in (few, few | own))
    for tensor in ("keys", "values"):
        for name, rows in getattr(weighed, tensor).items():
            factor = 10 if name.endswith("+gptq") else 1
            for row, before in zip(rows, getattr(without, tensor)[name], strict=True):
                assert row == pytest.approx([factor * error for error in before]), name
    assert sensitivity_errors("values/int2+rotated+gptq", 48) == "int2/64+rotated+gptq"
    assert sensitivity_errors("keys/int2", 48) == "int2" and sensitivity_errors("values", 64) == "int4/64"


def test_a_budget_leaves_hessians_out_where_predictions_gain_nothing_by_them(calibration):
    of_hessians = [name for name in SENSITIVITY_FORMATS if name.endswith("+gptq")]
    even = dict.fromkeys(("keys", "values"), (1.0, 1.0))
    for factor, used in ((0.5, True), (1e6, False)):
        swayed = replace(calibration, sensitivity=even | dict.fromkeys(of_hessians, (factor, factor)))
        recipes = for_stored_bits(swayed, 4.75, device="cpu", gptq=True).recipes
        assert any(recipe.uses_hessians for recipe in recipes) == used
    assert ModelCalibration.loads(swayed.dumps()) == swayed


def test_sensitivities_hold_for_the_formats_that_a_calibration_has(calibration):
    fewer = replace(calibration, keys={"int8": calibration.keys["int8"]}, values={"int8": calibration.values["int8"]})
    for row, other, factor in zip(fewer.keys["int8"], fewer.in_nats().keys["int8"], fewer.sensitivity["keys"], strict=True):
        assert other == pytest.approx([factor * error for error in row])


def test_a_calibration_without_sensitivities_of_pages_is_solved_for_a_ratio_by_its_errors(calibration):
    of_formats = {tensor: calibration.sensitivity[tensor] for tensor in ("keys", "values")}
    older = replace(calibration, sensitivity=of_formats)
    assert ModelCalibration.loads(older.dumps()) == older
    assert older.in_nats().pages == older.pages
    plain = replace(calibration, sensitivity=None)
    assert for_ratio_by_layer(older, 6, 2000) == for_ratio_by_layer(plain, 6, 2000)


def test_the_layer_that_predictions_depend_on_reads_more_pages(calibration):
    even = replace(
        calibration,
        keys={name: (rows[0], rows[0]) for name, rows in calibration.keys.items()},
        values={name: (rows[0], rows[0]) for name, rows in calibration.values.items()},
        pages={r: {f: (rows[0], rows[0]) for f, rows in curve.items()} for r, curve in calibration.pages.items()},
    )
    head = AttentionShape(1, 2, 1, 64)
    for first, second in ((1.0, 1e-3), (1e-3, 1.0)):
        swayed = replace(even, sensitivity=dict.fromkeys(("keys", "values", "pages"), (first, second)))
        plan = for_ratio_by_layer(swayed, 8, 8000)
        read = [interval_bytes(recipe, [8000], head, "bf16").kv for recipe in plan.recipes]
        assert (read[0] > 2 * read[1]) == (first > second)


def test_the_layer_that_predictions_depend_on_gets_the_bits(calibration):
    even = replace(
        calibration,
        keys={name: (rows[0], rows[0]) for name, rows in calibration.keys.items()},
        values={name: (rows[0], rows[0]) for name, rows in calibration.values.items()},
    )
    for first, second in ((1.0, 1e-3), (1e-3, 1.0)):
        swayed = replace(even, sensitivity=dict.fromkeys(("keys", "values"), (first, second)))
        plan = for_stored_bits(swayed, 5.5, device="cpu")
        bits = [stored_bits(recipe, 64) for recipe in plan.recipes]
        assert (bits[0] > bits[1]) == (first > second) and sum(bits) <= 11
        assert plan.error < sum(max(first, second) * sum(rows[0]) for rows in (even.keys["int4"], even.values["int4/64"]))


@pytest.mark.parametrize(
    "sensitivity",
    [
        {"keys": [1.0, 2.0]},
        {"keys": [1.0], "values": [1.0, 2.0]},
        {"keys": [-1.0, 1.0], "values": [1.0, 1.0]},
        5,
        {"keys": ["1", 2.0], "values": [1.0, 2.0]},
        {"keys": [True, 2.0], "values": [1.0, 2.0]},
        {"keys": [1e300, 1.0], "values": [1.0, 1.0]},
        {"keys": [1.0, 1.0], "values": [1.0, 1.0], "pages": [1.0]},
        {"keys": [1.0, 1.0], "values": [1.0, 1.0], "keys/int2": [1.0, -1.0]},
        {"keys": [1.0, 1.0], "values": [1.0, 1.0], "values/int4+rotated+gptq": [1.0]},
    ],
)
def test_a_damaged_one_is_refused_in_one_line(calibration, sensitivity):
    text = json.dumps(json.loads(calibration.dumps()) | {"sensitivity": sensitivity})
    with pytest.raises(UsageError, match="is damaged") as refusal:
        ModelCalibration.loads(text)
    assert "\n" not in str(refusal.value)


def test_errors_of_what_is_no_format_are_refused_in_one_line(calibration):
    record = json.loads(calibration.dumps())
    record["values"]["int4/x"] = record["values"]["int8"]
    with pytest.raises(UsageError, match=r"is damaged \(errors of 'int4/x', which names no format\): run") as refusal:
        ModelCalibration.loads(json.dumps(record))
    assert "\n" not in str(refusal.value)
