"""Generations that take turns with caches of their own, and their metrics."""

import pytest
import torch

from elastickv.errors import UsageError
from elastickv.model_benchmark.generation import (
    Sampling,
    elastic,
    stock,
    stock_static,
    take_turns,
)
from elastickv.model_benchmark.shapes import SHAPES, built, shape_named
from elastickv.model_benchmark.speedups import noise_floor, speedup, step_means
from tests.helpers.tiny_models import tiny_llama

PROMPT = 300


@pytest.fixture(scope="module")
def model():
    return tiny_llama(bos_token_id=None).model


@pytest.fixture
def prompt():
    ids = torch.randint(1, 128, (2, PROMPT), generator=torch.Generator().manual_seed(3))
    return ids, torch.ones_like(ids)


def both(model, prompt, sampling, total, **wanted):
    model.set_attn_implementation("sdpa")
    plain = stock(model, *prompt, sampling)
    return plain, elastic(model, *prompt, sampling, PROMPT + total, wanted)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_pieces_in_turns_are_the_text_of_one_generate(model, prompt, temperature):
    sampling = Sampling(temperature, seed=5)
    plain, ours = both(model, prompt, sampling, 12, compress=1)
    take_turns([plain, ours], 3, 4, seed=0)
    model.set_attn_implementation("sdpa")
    alone = stock(model, *prompt, sampling)
    alone.advance(12)
    assert plain.text_ids() == alone.text_ids() == ours.text_ids()
    assert [piece.tokens for piece in plain.pieces] == [4, 4, 4] and plain.new_tokens == 12


def test_sampling_depends_on_the_seed(model, prompt):
    texts = []
    for seed in (1, 2, 1):
        generation = stock(model, *prompt, Sampling(1.0, seed))
        generation.advance(8)
        texts.append(generation.text_ids())
    assert texts[0] == texts[2] != texts[1]


def test_every_generation_runs_under_the_attention_that_its_cache_works_with(model, prompt):
    plain, ours = both(model, prompt, Sampling(), 4, compress=2)
    ours.advance(2)
    assert model.config._attn_implementation == "elastickv"
    plain.advance(2)
    assert model.config._attn_implementation == "sdpa"


def test_the_metrics_counts_what_a_stock_cache_holds_and_reads(model, prompt):
    plain, _ = both(model, prompt, Sampling(), 4, compress=2)
    plain.advance(3)
    plain.advance(1)
    metrics = plain.metrics()
    token = 2 * 2 * 2 * 64 * 4  # rows, layers, keys and values, channels, float32
    assert metrics["kv_stored_bytes"] == (PROMPT + 3) * token
    # Three decodes after the prompt's pass: with 301, 302 and 303 tokens; counted as the mean of a piece's beginning and end.
    assert metrics["kv_read_bytes"] == pytest.approx(sum((PROMPT + n) * token for n in (1, 2, 3)), rel=0.01)
    assert metrics["new_tokens"] == 4 and metrics["rows"] == 2
    assert metrics["first_token_s"] > 0 and metrics["tokens_per_s"] > 0


def test_the_metrics_of_an_elastic_cache_is_its_report(model, prompt):
    _, ours = both(model, prompt, Sampling(), 8, compress=2)
    ours.advance(8)
    metrics, report = ours.metrics(), ours.cache.report()
    assert metrics["kv_read_bytes"] == report.read_bytes > 0
    assert metrics["kv_stored_bytes"] == report.stored_bytes
    assert metrics["stored_ratio"] == report.stored_ratio and metrics["read_ratio"] == report.read_ratio
    assert metrics["storing_share_of_first_token"] == report.quantize_seconds / ours.pieces[0].first_s


def test_the_interval_pairs_pieces_and_needs_three(model, prompt):
    plain, ours = both(model, prompt, Sampling(), 12, compress=2)
    take_turns([plain, ours], 1, 3, seed=0)
    assert speedup(plain, ours) is None
    take_turns([plain, ours], 1, 3, seed=0)
    assert speedup(plain, ours) is None
    take_turns([plain, ours], 2, 3, seed=0)
    assert speedup(plain, ours).samples == 4
    assert speedup(plain, ours, skipped=1).samples == 3
    assert speedup(plain, plain).estimate == 1
    assert speedup(plain, ours, skipped=2) is None
    assert noise_floor(step_means(plain)) is None
    assert noise_floor(step_means(plain) + step_means(ours)[:2]).samples == 3


def test_a_text_that_has_ended_sits_out(model, prompt):
    plain, ours = both(model, prompt, Sampling(), 12, compress=1)
    plain.advance(1)
    first = plain.text_ids()[0][0], plain.text_ids()[1][0]
    model.generation_config.eos_token_id = list(set(first))
    try:
        take_turns([plain, ours], 2, 4, seed=0)
        assert plain.new_tokens == 1 and ours.new_tokens == 1
        endless = stock(model, *prompt, Sampling(ends=False))
        endless.advance(4)
        assert endless.new_tokens == 4
    finally:
        model.generation_config.eos_token_id = None


def test_a_rehearsal_leaves_the_generation_as_it_was(model, prompt):
    plain, ours = both(model, prompt, Sampling(), 4, compress=1)
    model.set_attn_implementation("sdpa")
    static = stock_static(model, *prompt, Sampling(), PROMPT + 4)
    for generation in (plain, static, ours):
        generation.rehearse(192, 3)
        assert generation.new_tokens == 0 and int(generation.cache.get_seq_length()) == 0
        generation.advance(4)
    assert plain.text_ids() == static.text_ids() == ours.text_ids()


def test_a_static_cache_has_room_for_the_capacity_and_its_rehearsal_counts_as_its_own(model, prompt):
    model.set_attn_implementation("sdpa")
    static = stock_static(model, *prompt, Sampling(), PROMPT + 5)
    static.rehearse(192, 3)
    held = static.footprint.held_bytes
    static.advance(2)
    assert static.cache.layers[0].keys.shape[2] == 320
    if held is not None:
        assert static.footprint.peak_bytes >= static.cache.layers[0].keys.nbytes


def test_a_generation_starts_anew(model, prompt):
    _, ours = both(model, prompt, Sampling(0.9, seed=4), 6, compress=2)
    ours.advance(3)
    text = ours.text_ids()
    ours.restart()
    assert ours.new_tokens == 0 and not ours.pieces and ours.cache.get_seq_length() == 0
    ours.advance(3)
    assert ours.text_ids() == text and ours.metrics()["new_tokens"] == 3


def test_prompt_and_text_beyond_the_models_positions_are_refused(model, prompt):
    with pytest.raises(UsageError, match="4096 positions"):
        elastic(model, *prompt, Sampling(), 4097, {"compress": 2})


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), 1000.0])
def test_a_temperature_that_is_none_is_refused(temperature):
    with pytest.raises(UsageError, match="temperature"):
        Sampling(temperature)


@pytest.mark.parametrize(
    ("name", "billions"), [("0.5b", 0.494), ("1b", 1.236), ("3b", 3.213), ("8b", 8.030), ("70b", 70.554), ("405b", 405.853)]
)
def test_shapes_have_as_many_weights_as_the_models_were_published_with(name, billions):
    assert SHAPES[name].parameters / 1e9 == pytest.approx(billions, abs=0.001)


def test_a_shape_is_built_with_the_weights_that_it_counts():
    loaded, shape = built("shape:tiny", "bf16", "cpu"), SHAPES["tiny"]
    assert sum(weight.numel() for weight in loaded.model.parameters()) == shape.parameters
    assert sum(weight.nbytes for weight in loaded.model.parameters()) == shape.weights_bytes("bf16")
    again = built("shape:tiny", "bf16", "cpu")
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), again.model.parameters(), strict=True))


def test_a_shape_that_is_not_published_is_refused():
    assert shape_named("someone/model") is None
    with pytest.raises(UsageError, match="shape:8b"):
        shape_named("shape:9b")
