"""Calibration measures what a selection of pages, or a format, changes in a real forward pass."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from elastickv.backends.cpu import open_backend
from elastickv.errors import UsageError
from elastickv.evaluation.attention_inputs import norms_of_outputs, observed, through_norm
from elastickv.evaluation.calibrate import calibrate
from elastickv.evaluation.layer_errors import LayerInputs, _Head, _QueryRegions, hessians, layer_errors
from elastickv.evaluation.texts import Text
from elastickv.kvcache.gptq import hessian_of, hessian_text, layer_compensation
from elastickv.recipe import AttentionShape, ModelCalibration, Recipe, for_ratio_by_layer, for_stored_bits
from elastickv.recipe.calibration import StorageStatistics
from elastickv.recipe.shape import padded_head_dim
from elastickv.transformers import ElasticCache
from tests.helpers.tiny_models import TEXT, tiny_llama

TOKENS, RUN = 600, 16


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    positions = torch.arange(TOKENS - RUN, TOKENS)
    return LayerInputs(
        queries=1.5 * normal(4, RUN, 64), keys=normal(2, TOKENS, 64), values=normal(2, TOKENS, 64), projection=normal(48, 256),
        residual=torch.rand(RUN, generator=generator) + 1, positions=positions, scaling=64**-0.5,
    )  # fmt: skip


def replayed(inputs, recipe):
    """The error of every KV head by the CPU backend: prefill, then append and decode each position."""
    shape = AttentionShape(1, 4, 2, 64)
    known = StorageStatistics(None, *(tuple(hessian_text(h) for h in of.double().numpy()) for of in hessians(inputs)))
    dense, cache = (
        open_backend(None).cache(shape, TOKENS, "fp32", r, 0, layer_compensation(r, 64, known))
        for r in (Recipe.parse("dense"), recipe)
    )
    keys, values = (x.numpy()[None] for x in (inputs.keys, inputs.values))
    first = TOKENS - RUN
    total = np.zeros(2)
    for one in (dense, cache):
        one.prefill(np.ascontiguousarray(keys[:, :, :first]), np.ascontiguousarray(values[:, :, :first]), np.array([first]))
    for i in range(RUN):
        outputs = []
        for one in (dense, cache):
            one.append(*(np.ascontiguousarray(x[:, :, first + i]) for x in (keys, values)))
            outputs.append(one.decode(inputs.queries[None, :, i].contiguous().numpy())[0])
        change = (outputs[1] - outputs[0])[0].reshape(2, 2 * 64)
        for head in range(2):
            projected = inputs.projection.numpy()[:, head * 128 : head * 128 + 128] @ change[head]
            total[head] += (projected**2).sum() / float(inputs.residual[i]) / RUN
    return total


@pytest.mark.parametrize(("fraction", "steps"), [(1 / 2, 1), (1 / 4, 4), (1 / 8, 16)])
def test_selection_errs_as_it_does_on_the_back_end(inputs, fraction, steps):
    """Rounding is there too on the backend: selection of an eighth to a half of random pages outweighs it by far."""
    measured = layer_errors(inputs, (fraction,), (steps,), RUN).pages[steps][fraction]
    recipe = Recipe("int4", "int8", selection="pages", fractions=(fraction,), anchor_every=steps)
    np.testing.assert_allclose(measured, replayed(inputs, recipe), rtol=0.12)


@pytest.mark.parametrize(
    ("recipe", "key", "value"),
    [
        ("int8", "int8", "int8"),
        ("k=int8,v=int4,vgroup=32", "int8", "int4/32"),
        ("int4", "int4", "int4/64"),
        ("int8,rotate=k", "int8+rotated", "int8"),
        ("k=int8,v=int4,vgroup=32,rotate=kv", "int8+rotated", "int4/32+rotated"),
        ("int4,rotate=kv", "int4+rotated", "int4/64+rotated"),
        ("int4,rounding=gptq", "int4+gptq", "int4/64+gptq"),
        ("k=int4,v=int3,rotate=kv,rounding=gptq", "int4+rotated+gptq", "int3/64+rotated+gptq"),
        ("int3", "int3", "int3/64"),
        ("int3,rotate=kv,rounding=gptq", "int3+rotated+gptq", "int3/64+rotated+gptq"),
        ("int2,rotate=kv,rounding=gptq", "int2+rotated+gptq", "int2/64+rotated+gptq"),
        ("k=int2,v=int8,rotate=k", "int2+rotated", "int8"),
    ],
)
def test_rounding_errs_as_it_does_on_the_back_end(inputs, recipe, key, value):
    measured = layer_errors(inputs, (1.0,), (1,), RUN)
    together = np.array(measured.keys[key]) + np.array(measured.values[value])
    # The window is kept in bfloat16 by the backend, and the last positions' rounding begins a page early here.
    np.testing.assert_allclose(together, replayed(inputs, Recipe.parse(recipe)), rtol=0.35)


def test_rounding_by_hessians_errs_less_where_queries_and_columns_are_correlated(inputs):
    """Of 64 channels, 24 directions matter to the queries, and as many to the output."""
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(4, RUN, 24, generator=generator) @ torch.randn(24, 64, generator=generator) / 4
    few = torch.randn(24, 64, generator=generator)
    projection = torch.cat([torch.randn(48, 24, generator=generator) @ few for _ in range(4)], 1)
    errors = layer_errors(replace(inputs, queries=queries, projection=projection), (1.0,), (1,), RUN)
    for of_tensor, names in (
        (errors.keys, ("int4", "int4+rotated", "int3+rotated", "int2+rotated", "int8+rotated")),
        (errors.values, ("int4/64", "int3/64+rotated")),
    ):
        for name in names:
            assert sum(of_tensor[f"{name}+gptq"]) < 0.7 * sum(of_tensor[name])


def test_a_rotation_errs_less_where_a_few_channels_of_values_are_large(inputs):
    values = inputs.values.clone()
    values[..., [3, 40]] *= 20
    errors = layer_errors(replace(inputs, values=values), (1.0,), (1,), RUN).values
    for name in ("int8", "int4/32", "int4/64"):
        assert sum(errors[f"{name}+rotated"]) < 0.5 * sum(errors[name])


def test_the_sixteen_bits_of_rotated_exact_tokens_count(inputs):
    """A large bias has few bits of its own, and many once it is in every channel: in the window, too."""
    keys = inputs.keys.clone()
    keys[..., 9] = 512
    exact, biased = (
        layer_errors(replace(inputs, keys=k), (1.0,), (1,), RUN, window=2 * TOKENS).keys for k in (inputs.keys, keys)
    )
    assert sum(biased["int4"]) == 0 < sum(exact["int4+rotated"]) < 0.01 * sum(biased["int4+rotated"])


def test_fewer_pages_never_err_less_and_all_pages_do_not_err(inputs):
    curve = layer_errors(inputs, (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 32), (1,), RUN).pages[1]
    assert curve[1.0] == [0.0, 0.0]
    for head in range(2):
        errors = [curve[f][head] for f in sorted(curve, reverse=True)]
        assert errors == sorted(errors) and errors[1] > 0


def attended(queries, keys, values, inputs, allowed):
    """Attention in float64, of (queries, head_dim) and an (queries, tokens) mask."""
    scores = (queries.double() @ keys.double().T * inputs.scaling).masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1) @ values.double()


def test_leaving_pages_out_is_attention_without_their_tokens(inputs):
    """All lists of a head are one product of matrices with the sums of its pages; here each is attention of its own."""
    regions = _QueryRegions(inputs.positions, TOKENS, 4, 128)
    generator = torch.Generator().manual_seed(1)
    left_out = (torch.rand(RUN, 3, regions.pages, generator=generator) < 0.6) & regions.is_cold[:, None]
    head = _Head(inputs, 1, regions)
    outputs = head.without(left_out)
    seen = torch.arange(TOKENS) <= inputs.positions[:, None]
    projection = inputs.projection[:, 128:].double()
    for number in range(3):
        allowed = seen.clone()
        allowed[:, regions.cold_tokens] &= ~left_out[:, number].repeat_interleave(32, dim=1)
        expected = [attended(inputs.queries[2 + q], inputs.keys[1], inputs.values[1], inputs, allowed) for q in range(2)]
        exact = [attended(inputs.queries[2 + q], inputs.keys[1], inputs.values[1], inputs, seen) for q in range(2)]
        for q in range(2):
            torch.testing.assert_close(outputs[number, q].double(), expected[q], rtol=1e-4, atol=1e-5)
        change = torch.cat([a - b for a, b in zip(expected, exact, strict=True)], -1) @ projection.T
        error = float((change.square().sum(-1) / inputs.residual).mean())
        assert head.errors(outputs)[number] == pytest.approx(error, rel=1e-4)


def test_a_page_that_holds_all_the_weight_can_be_left_out(inputs):
    """What is left is tiny against the page: a difference of the two would be rounding error, and its square infinite."""
    keys = inputs.keys.clone()
    keys[1, 4 : 4 + 32] = 40 * inputs.queries[2:].mean((0, 1))
    queries = 0.1 * inputs.queries + inputs.queries[2:].mean((0, 1))
    sharp = replace(inputs, keys=keys, queries=queries)
    regions = _QueryRegions(sharp.positions, TOKENS, 4, 128)
    left_out = torch.zeros(RUN, 1, regions.pages, dtype=torch.bool)
    left_out[:, :, 0] = True
    outputs = _Head(sharp, 1, regions).without(left_out)[0]
    allowed = torch.arange(TOKENS) <= sharp.positions[:, None]
    allowed[:, 4 : 4 + 32] = False
    for q in range(2):
        expected = attended(queries[2 + q], keys[1], sharp.values[1], sharp, allowed)
        torch.testing.assert_close(outputs[q].double(), expected, rtol=1e-3, atol=1e-4)


def test_errors_of_many_lists_at_once_are_those_of_each_alone(inputs):
    fractions, schedules = (1.0, 1 / 2, 1 / 8), (1, 4)
    together = layer_errors(inputs, fractions, schedules, RUN)
    for steps in schedules:
        for fraction in fractions:
            alone = layer_errors(inputs, (fraction,), (steps,), RUN)
            assert alone.pages[steps][fraction] == pytest.approx(together.pages[steps][fraction], rel=1e-5)
            assert (alone.keys, alone.values) == (together.keys, together.values)


def test_a_model_is_calibrated_and_left_as_it_was():
    loaded = tiny_llama()
    before = loaded.model.config._attn_implementation
    result = calibrate(loaded, Text("letters", TEXT), 1200)
    assert loaded.model.config._attn_implementation == before
    assert not any(module._forward_pre_hooks for module in loaded.model.modules())
    assert (result.layers, result.query_heads, result.kv_heads, result.head_dim) == ((0, 1), 2, 1, 64)
    assert result.pages[1][1 / 8][0][0] > result.pages[1][1 / 2][0][0] > 0
    assert result.keys["int4"][0][0] > result.keys["int8"][0][0] > 0
    assert result.keys["int4"][0][0] > result.keys["int8_per_channel"][0][0] > 0
    assert result.keys["int3"][0][0] > result.keys["int4"][0][0]
    assert result.values["int3/64"][0][0] > result.values["int4/64"][0][0] > 0
    grouped = {f"{fmt}/{group}" for fmt in ("int4", "int3", "int2") for group in (32, 64)}
    by_hessians = {"int4/64+gptq", *(f"{fmt}/64+rotated+gptq" for fmt in ("int4", "int3", "int2"))}
    assert {name for name in result.values if "/" in name} == grouped | {f"{name}+rotated" for name in grouped} | by_hessians
    known = result.statistics_of(1)
    assert [hessian_of(texts[0], 64).shape for texts in (known.key_hessians, known.value_hessians)] == [(64, 64)] * 2
    assert {len(head) for layer in result.smoothing for head in layer} == {64}
    assert ModelCalibration.loads(result.dumps()) == result
    result.check_model(result.fingerprint)
    assert calibrate(tiny_llama(seed=1), Text("letters", TEXT), 1200).fingerprint != result.fingerprint


@pytest.mark.parametrize("head_dim", [16, 48, 72])
def test_heads_that_a_cache_pads_are_measured_as_they_are_stored(head_dim):
    """Groups of values are those of the stored head, and every way from the file to recipes is open."""
    loaded = tiny_llama(head_dim=head_dim)
    result = ModelCalibration.loads(calibrate(loaded, Text("letters", TEXT), 1200).dumps())
    stored = padded_head_dim(head_dim)
    assert result.head_dim == head_dim and f"int4/{stored}" in result.values
    plans = for_stored_bits(result, 5, device="cpu", gptq=True), for_ratio_by_layer(result, 2, 1200, device="cpu", gptq=True)
    for plan in plans:
        assert all(recipe.v_group(stored) for recipe in plan.recipes)
    for given in ({"stored_bits": 5}, {"compress": 2}):
        cache = ElasticCache.for_model(loaded.model, calibration=result, **given)
        ids = torch.arange(400)[None] % 50
        assert loaded.model.generate(ids, max_new_tokens=2, past_key_values=cache, do_sample=False).shape == (1, 402)


def test_a_model_is_left_as_it_was_when_the_measurement_fails():
    loaded = tiny_llama()
    before = loaded.model.config._attn_implementation

    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), observed(loaded.model, [3], fail):
        loaded.model(input_ids=torch.arange(8)[None])
    assert loaded.model.config._attn_implementation == before
    assert not any(module._forward_pre_hooks for module in loaded.model.modules())


def with_norms_of_outputs(kind):
    """A small random model whose layers normalize what their attention writes."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 2048, "head_dim": 64, "pad_token_id": 0}
    if kind == "Gemma3":
        config = transformers.Gemma3TextConfig(**sizes, layer_types=["full_attention"] * 2)
        model = transformers.Gemma3ForCausalLM(config)
    else:
        model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes))
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.o_proj.weight, std=0.5)
    return replace(tiny_llama(), name=kind, model=model.eval())


@pytest.mark.parametrize(
    ("kind", "name"),
    [("Gemma3", "post_attention_layernorm"), ("Olmo2", "post_attention_layernorm"), ("Glm4", "post_self_attn_layernorm")],
)
def test_the_norm_of_an_attentions_output_is_found(kind, name):
    model = with_norms_of_outputs(kind).model
    assert norms_of_outputs(model) == {layer.self_attn: getattr(layer, name) for layer in model.model.layers}


def test_a_norm_of_the_sum_is_none_of_the_output():
    assert norms_of_outputs(tiny_llama().model) == {}


def test_errors_are_those_behind_the_norm_of_the_output():
    """Where the output is normalized, a factor on it changes nothing."""
    loaded, positions = with_norms_of_outputs("Gemma3"), [3, 7]
    ids, inputs = torch.arange(8)[None], []
    for _ in range(2):
        with torch.inference_mode(), observed(loaded.model, positions, lambda layer, given: inputs.append(given)):
            loaded.model(input_ids=ids)
        with torch.no_grad():
            for layer in loaded.model.model.layers:
                layer.self_attn.o_proj.weight *= 8
    costs = [each.projection.square() / each.residual[:, None, None] for each in inputs]
    torch.testing.assert_close(costs[2:], costs[:2], rtol=1e-3, atol=0)


def test_a_small_change_goes_through_the_norm_as_its_errors_say():
    """The square of a change behind the norm, against the gains and the mean square that it is measured with."""
    torch.manual_seed(0)
    norm = transformers.models.gemma3.modeling_gemma3.Gemma3RMSNorm(64)
    torch.nn.init.normal_(norm.weight)
    module = torch.nn.Module()
    module.o_proj = torch.nn.Linear(128, 64, bias=False)
    attended, change = torch.randn(500, 2, 64), 1e-3 * torch.randn(500, 2, 64)
    gains, mean_square = through_norm(norm, module, attended)
    before, after = (norm(module.o_proj(each.flatten(1))) for each in (attended, attended + change))
    expected = (change.flatten(1) @ (gains * module.o_proj.weight).T).square().sum(1) / mean_square
    # Without what the change adds to the root mean square itself, one direction of 64.
    torch.testing.assert_close((after - before).square().sum(1).mean(), expected.mean(), rtol=0.06, atol=0)


def test_observing_changes_no_logit():
    loaded = tiny_llama()
    ids = torch.arange(64)[None]
    with torch.inference_mode():
        plain = loaded.model(input_ids=ids).logits
        with observed(loaded.model, [3], lambda *_: None):
            torch.testing.assert_close(loaded.model(input_ids=ids).logits, plain)


@pytest.mark.parametrize(("text", "tokens", "named"), [(TEXT, 300, "too short"), ("short", 2000, "5 tokens")])
def test_too_little_text_is_refused(text, tokens, named):
    with pytest.raises(UsageError, match=named):
        calibrate(tiny_llama(), Text("letters", text), tokens)
