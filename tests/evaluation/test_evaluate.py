"""The evaluation end to end on a model of two layers, through the cache that `generate` uses."""

import json
from dataclasses import replace

import pytest
import torch

from elastickv.errors import UsageError
from elastickv.evaluation import sessions
from elastickv.evaluation.calibrate import calibrate
from elastickv.evaluation.evaluate import EvaluationOptions, evaluate
from elastickv.evaluation.generations.continuation_options import ContinuationOptions
from elastickv.evaluation.prefill import TOKENS_PER_PASS, prefill
from elastickv.evaluation.scoring import score
from elastickv.evaluation.suggestion import Tolerance
from elastickv.evaluation.texts import Text, windows
from elastickv.recipe import Recipe
from elastickv.results.formats import plain_json
from elastickv.results.formats.fidelity_table import fidelity_tables
from elastickv.results.kinds.evaluation_result import EvaluationResult
from tests.helpers.tiny_models import TEXT, tiny_llama

TEXTS = [Text("letters", TEXT), Text("srettel", TEXT[::-1])]
OPTIONS = EvaluationOptions(
    ratios=(1.0, 2.0, 4.0, 64.0),
    contexts=(800,),
    window_count=2,
    scored=12,
    needle_lengths=(700,),
    needle_depths=2,
    greedy_tokens=3,
    tolerance=Tolerance.parse("kl=0.001"),
)


class Silent:
    def phase(self, name):
        pass

    def progress(self, done, total):
        pass


@pytest.fixture(scope="module")
def loaded():
    return tiny_llama()


@pytest.fixture(scope="module")
def calibration(loaded):
    return calibrate(loaded, Text("other", TEXT[1000:3000]), 1000)


@pytest.fixture(scope="module")
def result(loaded, calibration):
    return evaluate(loaded, TEXTS, OPTIONS, calibration, Silent())


def test_without_compression_nothing_is_lost(result):
    row = result["rows"][0]
    assert (row["cache"], row["read_ratio"], row["context"]) == ("C=1", 1.0, 800)
    assert row["top1_percent"]["mean"] == 100
    assert abs(row["ppl_change_percent"]["mean"]) < 1e-3 and row["kl"]["mean"] < 1e-8
    assert row["greedy"]["same_rows"] == 2 and row["greedy"]["length_ratio"] == 1


def test_more_compression_reads_less_and_loses_more(result):
    one, two, four = result["rows"]
    assert two["read_ratio"] >= 2 and four["read_ratio"] >= 4
    assert one["kl"]["mean"] < two["kl"]["mean"] < four["kl"]["mean"]
    assert one["step_bytes_read"] > two["step_bytes_read"] > four["step_bytes_read"]
    assert two["stored_ratio"] > 1 and four["bytes_stored"] < one["bytes_stored"]


def test_a_ratio_that_cannot_be_met_is_left_out_and_said(result):
    assert "compress=64 cannot be met" in result["skipped"][0]


def test_retrieval_is_measured_at_every_depth_for_every_cache(result):
    (row,) = result["needle"]
    assert row["depths"] == [0.0, 1.0]
    assert set(row["found"]) == {"full", "C=1", "C=2", "C=4"} and row["found"]["full"] == row["found"]["C=1"]


def test_the_suggestion_is_within_the_tolerance(result):
    assert result["suggestion"] == {"tolerance": "kl=0.001", "compress": 1, "certain": True}


def test_the_result_is_json_and_a_table(result):
    assert json.loads(plain_json.dumps(result))["rows"][0]["windows"] == 2
    shown = fidelity_tables(EvaluationResult.from_dict(result))
    for named in ("tiny", "C=4", result["rows"][2]["recipe_hash"], "pass key in", "Largest C within kl=0.001: 1", "left out:"):
        assert named in shown


def test_recipes_are_what_the_decode_path_runs(loaded):
    """Elastic decoding equals a decode with the keys and values that an int8 cache holds: the loss is real, and not more."""
    rows = windows(TEXTS, loaded.tokenizer, 400, 2)
    start = prefill(loaded.model, [row.ids[:-1] for row in rows], 389, 10)
    scores = score(rows, start, lambda begun, n: sessions.elastic(loaded.model, [Recipe.parse("int8")] * 2, begun, n))
    crude = score(rows, start, lambda begun, n: sessions.elastic(loaded.model, [Recipe.parse("int4")] * 2, begun, n))
    assert 0 < scores.kl.mean() < crude.kl.mean() / 10


@pytest.mark.parametrize("tokens_per_pass", [1, 90])
def test_a_prefill_is_what_the_model_computes(loaded, monkeypatch, tokens_per_pass):
    """One row after the other, or two together and the third alone."""
    monkeypatch.setitem(TOKENS_PER_PASS, "cpu", tokens_per_pass)
    rows = [tuple(range(40)), tuple(range(40, 80)), tuple(range(20, 60))]
    start = prefill(loaded.model, rows, 30, 5)
    with torch.inference_mode():
        logits = loaded.model(input_ids=torch.tensor(rows)).logits[:, -5:]
    torch.testing.assert_close(start.logits, logits, rtol=1e-4, atol=1e-4)
    assert (start.rows, start.tokens) == (3, 30)
    alone = prefill(loaded.model, rows[1:2], 30, 5)
    torch.testing.assert_close(start.keys[1][1:2], alone.keys[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(start.values[1][1:2], alone.values[1], rtol=1e-4, atol=1e-4)


def test_the_model_is_left_as_it_was_when_decoding_fails(loaded):
    before = loaded.model.config._attn_implementation
    start = prefill(loaded.model, [tuple(range(40))], 30, 5)
    with pytest.raises(RuntimeError, match="stop"), sessions.elastic(loaded.model, [Recipe.parse("int8")] * 2, start, 5):
        raise RuntimeError("stop")
    assert loaded.model.config._attn_implementation == before


def test_the_frameworks_quantised_cache_is_measured_beside(loaded, calibration):
    options = replace(OPTIONS, ratios=(2.0,), needle_lengths=(), greedy_tokens=0, reference=True, tolerance=None)
    rows = evaluate(loaded, TEXTS, options, calibration, Silent())["rows"]
    assert [row["cache"] for row in rows] == ["C=2", "stock-quantized"]
    assert rows[1]["kl"]["mean"] > 0 and rows[1]["bits"] in (4, 8)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"contexts": (12,)}, "nothing before the 12 scored"),
        ({"contexts": (5000,)}, "positions|tokens and a window needs"),
        ({"ratios": (64.0,)}, "compress=64 cannot be met"),
        ({"needle_lengths": (40,)}, "a needle at 40 tokens"),
        ({"contexts": (), "tolerance": None, "generation": ContinuationOptions(tokens=7)}, "`generate` continues windows"),
    ],
)
def test_options_that_cannot_be_measured_are_refused_before_anything_is(loaded, change, named):
    with pytest.raises(UsageError, match=named):
        evaluate(loaded, TEXTS, replace(OPTIONS, **change), None, Silent())


def test_a_calibration_of_another_model_is_refused(calibration):
    with pytest.raises(UsageError, match="elastickv calibrate"):
        evaluate(tiny_llama(seed=1), TEXTS, OPTIONS, calibration, Silent())
