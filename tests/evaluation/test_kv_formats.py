"""KV formats through the evaluation: the layer that rounds, the command's result, its tables, files of earlier versions."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from elastickv.errors import UsageError
from elastickv.evaluation import sessions
from elastickv.evaluation.evaluate import EvaluationOptions, evaluate
from elastickv.evaluation.exact_tokens import ExactTokens
from elastickv.evaluation.format_paths import refused_formats
from elastickv.evaluation.kv_formats.format_layer import FormatLayer
from elastickv.evaluation.kv_formats.published_formats import PUBLISHED
from elastickv.evaluation.prefill import prefill
from elastickv.results.formats import plain_json
from elastickv.results.formats.fidelity_table import fidelity_tables
from elastickv.results.kinds.evaluation_result import EvaluationResult
from tests.evaluation.test_evaluate import TEXTS, Silent
from tests.evaluation.test_mixed_layers import convolutional, windowed
from tests.evaluation.test_mixed_layers import loaded as of_config
from tests.helpers.tiny_models import tiny_llama

FORMATS = ("q8_0", "q4_0", "kivi2_r32", "int4", "k=int8,v=int4")
OPTIONS = EvaluationOptions(
    ratios=(),
    contexts=(400,),
    window_count=2,
    scored=6,
    needle_lengths=(450,),
    needle_depths=1,
    greedy_tokens=2,
    formats=FORMATS,
)


@pytest.fixture(scope="module")
def loaded():
    return tiny_llama()


@pytest.fixture(scope="module")
def result(loaded):
    return evaluate(loaded, TEXTS, OPTIONS, None, Silent())


def states(tokens, seed=0):
    return torch.randn(2, 1, tokens, 64, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


@pytest.mark.parametrize("name", ["q4_0", "kivi2_r32", "kvarn_k4v4_g128", "nvfp4_calibrated"])
def test_a_layer_rounds_every_token_once_as_soon_as_it_is_old_enough(name):
    published = PUBLISHED[name]
    layer, keys, values = FormatLayer(published), states(300), states(300, 1)
    before = keys.clone()
    layer.update(keys[:, :, :200], values[:, :, :200])
    for token in range(200, 300):
        read = layer.update(keys[:, :, token : token + 1], values[:, :, token : token + 1])
    assert torch.equal(keys, before), "what the model computed is left as it was"
    for plane, exact, mine in zip((published.keys, published.values), (keys, values), read, strict=True):
        first = published.sinks
        end = first + plane.stored_tokens(300, first)
        scale = plane.layer_scale(exact[:, :, first : first + plane.stored_tokens(200, first)])
        torch.testing.assert_close(mine[:, :, first:end], plane.read_back(exact[:, :, first:end], scale))
        assert torch.equal(mine[:, :, :first], exact[:, :, :first]) and torch.equal(mine[:, :, end:], exact[:, :, end:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_exact_numbers_stay_as_the_model_computed_them(dtype):
    layer = FormatLayer(PUBLISHED["kivi4"].with_exact(ExactTokens(0, 1000)))
    x = torch.full((1, 1, 2, 64), 1 + 2**-9).to(dtype)
    assert all(read.dtype == dtype and torch.equal(read, x) for read in layer.update(x, x))


def test_a_format_that_rounds_nothing_yet_is_the_stock_cache(loaded):
    rows = [tuple(range(60)), tuple(range(40, 100))]
    start = prefill(loaded.model, rows, 50, 5)
    everything_exact = PUBLISHED["kivi2"].with_exact(ExactTokens(0, 1000))
    logits = []
    for decoding in (sessions.stock(loaded.model, start), sessions.published(loaded.model, everything_exact, start)):
        with decoding as session:
            logits.append(torch.stack([session.step(torch.tensor([i, i + 1])) for i in range(3)]))
    assert torch.equal(*logits)


def test_layers_that_a_preset_leaves_out_are_exact(loaded):
    """Two layers are the first and the last one."""
    start = prefill(loaded.model, [tuple(range(60))], 50, 5)
    preset, logits = PUBLISHED["turboquant_3bit_nc"], []
    for stored_as in (preset, replace(preset, outer_layers=0), preset.with_exact(ExactTokens(0, 1000))):
        with sessions.published(loaded.model, stored_as, start) as session:
            logits.append(session.step(torch.tensor([1])))
    assert torch.equal(logits[0], logits[2]) and not torch.equal(logits[0], logits[1])


def test_every_format_is_a_row_with_its_bits(result):
    rows = {row["cache"]: row for row in result["rows"]}
    assert tuple(rows) == FORMATS and all(row["compress"] is None and row["scored_tokens"] == 12 for row in rows.values())
    bits = {name: row["stored_format"]["bits_per_element"] for name, row in rows.items()}
    # 64 channels: int4's K has 32 bits of scale and zero for 32 tokens, its V 32 bits for 64 channels.
    assert bits == {"q8_0": 8.5, "q4_0": 4.5, "kivi2_r32": 3.0, "int4": 4.75, "k=int8,v=int4": (8.25 + 4.5) / 2}
    assert rows["q8_0"]["kl"]["mean"] < rows["q4_0"]["kl"]["mean"] < rows["kivi2_r32"]["kl"]["mean"]
    assert rows["int4"]["recipes"] == ["int4"] and "recipes" not in rows["q4_0"]
    assert all(row["greedy"]["tokens"] == 2 for row in rows.values())


def test_stored_bits_count_what_is_exact_at_the_end(result):
    rows = {row["cache"]: row for row in result["rows"]}
    assert rows["q4_0"]["stored_format"]["stored_bits_per_element"] == 4.5
    assert rows["q4_0"]["stored_ratio"] == pytest.approx(16 / 4.5)
    # 399 tokens: 384 keys in blocks of 32 after the step before, values but the newest 33.
    kivi = rows["kivi2_r32"]["stored_format"]
    assert (kivi["exact_keys"], kivi["exact_values"]) == (15, 33)
    assert kivi["stored_bits_per_element"] == pytest.approx((3 * (384 + 366) + 16 * (15 + 33)) / (2 * 399))
    # Four sinks, 128 newest tokens and the 11 that fill no page.
    own = rows["int4"]["stored_format"]
    assert own["exact_keys"] == 4 + 128 + 11
    assert own["stored_bits_per_element"] == pytest.approx((4.75 * 256 + 16 * 143) / 399)


def test_pass_keys_are_looked_for_with_every_format(result):
    assert list(result["needle"][0]["found"]) == ["full", *FORMATS]


def test_equal_windows_are_those_of_all_formats(loaded):
    options = replace(OPTIONS, needle_lengths=(), greedy_tokens=0, exact_tokens=ExactTokens(4, 64))
    rows = evaluate(loaded, TEXTS, options, None, Silent())["rows"]
    exact = [row["stored_format"]["exact_values"] for row in rows]
    # 399 tokens less 68: 331 are stored one by one, or 320 in pages of 32.
    assert exact == [68, 68, 68, 79, 79] and rows[2]["stored_format"]["exact_keys"] == 79


def test_the_result_is_json_and_a_table_of_formats(result):
    read = EvaluationResult.from_dict(json.loads(plain_json.dumps(result)))
    assert read.rows[2].stored_format.bits_per_element == 3 and read.options["formats"] == list(FORMATS)
    shown = fidelity_tables(read)
    for named in ("stored bits", "kivi2_r32", "arXiv 2402.02750", "exact K / V", "15 / 33", "k=int8,v=int4"):
        assert named in shown
    assert "read 1/" not in shown and "calibrated" not in shown, "there is no table of values of C without one"


def test_files_of_earlier_versions_have_no_format(result):
    old = json.loads(plain_json.dumps(result))
    for row in old["rows"]:
        del row["stored_format"]
        row |= {"quantiser": "quanto", "bits": 4}
    rows = EvaluationResult.from_dict(old).rows
    assert [row.stored_format for row in rows] == [None] * len(FORMATS)
    assert "quanto, 4 bits" in fidelity_tables(EvaluationResult.from_dict(old))


def test_formats_and_values_of_c_are_measured_together(loaded):
    options = replace(OPTIONS, ratios=(1.0,), formats=("q8_0",), needle_lengths=(), greedy_tokens=0)
    rows = evaluate(loaded, TEXTS, options, None, Silent())["rows"]
    assert [row["cache"] for row in rows] == ["C=1", "q8_0"] and "stored_format" not in rows[0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"formats": ()}, "nothing is measured: give values of C in `compress`, or `formats`"),
        ({"ratios": (64.0,)}, "compress=64 cannot be met"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(loaded, change, named):
    with pytest.raises(UsageError, match=named):
        evaluate(loaded, TEXTS, replace(OPTIONS, **change), None, Silent())


def test_heads_that_do_not_fit_a_format_are_refused():
    small = tiny_llama(head_dim=32)
    with pytest.raises(UsageError, match="format q4_0_rotated needs heads of a multiple of 64 channels, not of 32"):
        evaluate(small, TEXTS, replace(OPTIONS, formats=("q4_0_rotated",)), None, Silent())


WINDOWED = ("q4_0", "nvfp4_calibrated", "kivi2", "kivi4_r32", "kvarn_k4v4_g128", "turboquant_3bit_nc")


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("prompt", [20, 240])
def test_several_tokens_at_once_are_as_many_steps(name, prompt):
    """Two layers, so that what the first one rounds reaches the second; windows end and blocks fill up in between."""
    model = tiny_llama(head_dim=64, num_attention_heads=4, num_key_value_heads=2).model
    rows = [[(7 * i * i + 3 * i + row) % 128 for i in range(270)] for row in range(2)]
    start = prefill(model, [row[: prompt + 3] for row in rows], prompt, 2)
    ids = torch.tensor(rows)[:, prompt : prompt + 30]
    published = replace(PUBLISHED[name], outer_layers=0)
    with sessions.published(model, published, start) as session:
        assert session.takes_several
        together = torch.cat([session.read(part) for part in ids.split(18, 1)], 1)
    with sessions.published(model, published, start) as session:
        logits = torch.stack([session.step(token) for token in ids.T], 1)
    with sessions.stock(model, start) as session:
        exact = torch.stack([session.step(token) for token in ids.T], 1)
    # Other orders of addition turn single codes over; where windows hold all tokens, nothing is rounded.
    noise = 1e-5 * exact.abs().max()
    assert (together - logits).abs().mean() < 0.01 * (logits - exact).abs().mean() + noise


@pytest.mark.parametrize("outer_layers", [0, 1])
def test_layers_with_a_window_take_several_tokens_too(outer_layers):
    model = of_config(windowed()).model
    rows = [[(7 * i * i + 3 * i + row) % 100 for i in range(120)] for row in range(2)]
    start = prefill(model, [row[:93] for row in rows], 90, 2)
    ids, q4_0 = torch.tensor(rows)[:, 90:], replace(PUBLISHED["q4_0"], outer_layers=outer_layers)
    with sessions.published(model, q4_0, start) as session:
        together = torch.cat([session.read(part) for part in ids.split(18, 1)], 1)
    with sessions.published(model, q4_0, start) as session:
        steps = torch.stack([session.step(token) for token in ids.T], 1)
    assert (together - steps).abs().max() < 1e-3 * steps.abs().max()


def test_a_state_is_followed_token_by_token():
    model = of_config(convolutional()).model
    start = prefill(model, [list(range(40))], 30, 5)
    with sessions.published(model, PUBLISHED["q4_0"], start) as session:
        assert not session.takes_several


def test_a_recipe_that_the_models_device_does_not_read_is_left_out_and_named():
    on_gpu, on_cpu = SimpleNamespace(device="cuda"), SimpleNamespace(device="cpu")
    names = ("kivi2", "k=int4,v=int3", "int4")
    said = "k=int4,v=int3 is not measured: format int3 has no CUDA kernel, reference:k=int4,v=int3 needs none"
    assert refused_formats(on_gpu, names) == {"k=int4,v=int3": said}
    assert refused_formats(on_cpu, names) == refused_formats(on_gpu, ()) == {}
    assert refused_formats(on_gpu, ["reference:k=int4,v=int3"]) == {}
    with pytest.raises(UsageError, match=r"^k=int4,v=int3 is not measured: .*: give other formats, or the cpu as device$"):
        refused_formats(on_gpu, names[1:2])


def test_a_recipe_that_needs_hessians_is_left_out_where_there_are_none_or_no_kernel_rounds_so():
    known, older = (SimpleNamespace(hessians=each) for each in ({"keys": (), "values": ()}, None))
    name = "int4,rounding=gptq"
    names = (name, f"reference:{name}", "int4")
    for calibration in (None, older):
        refused = refused_formats(SimpleNamespace(device="cpu", calibration=calibration), names)
        assert set(refused) == set(names[:2])
        assert "needs a calibration with Hessians: run `elastickv calibrate`" in refused[names[1]]
    said = f"{name} is not measured: rounding=gptq has no CUDA kernel, reference:{name} needs none"
    assert refused_formats(SimpleNamespace(device="cuda", calibration=known), names) == {name: said}
    assert refused_formats(SimpleNamespace(device="cpu", calibration=known), names) == {}
