"""`elastickv eval --engine vllm`: figures are those of Transformers where its attention reads as the engine's does."""

import json
from dataclasses import replace

import pytest
import torch

from elastickv.benchmark.reporter import SILENT
from elastickv.errors import UsageError
from elastickv.evaluation.serving.engine_options import EngineOptions
from elastickv.evaluation.serving.evaluate_served import evaluate_served
from elastickv.evaluation.serving.served_checkpoint import ServedCheckpoint
from elastickv.results.formats.fidelity_table import fidelity_tables
from elastickv.results.kinds.evaluation_result import EvaluationResult
from tests.helpers.served_evaluation import CONTEXT, OPTIONS, WINDOW, difference, losses_in_transformers, random_texts
from tests.helpers.served_llama import write_model

# Of a KL, in parts of it. Float32 alone moves it by less than a tenth of that, as sums have another order and a few numbers get
# another code; other rules move it by more than five times that.
TOLERANCE = 1e-3
RULES = {
    "a window of two tokens more": lambda layer, rule: replace(rule, window=rule.window + 2),
    "formats of more bits": lambda layer, rule: replace(rule, pages=replace(rule.pages, key_format="int8_per_channel")),
    "an exact layer": lambda layer, rule: replace(rule, window=CONTEXT) if layer else rule,
}
SELECTIONS = {
    "fewer anchors": lambda layer, rule: replace(rule, pages=replace(rule.pages, anchor_every=2 * rule.pages.anchor_every)),
    "another share of the pages": lambda layer, rule: replace(rule, pages=replace(rule.pages, fractions=(0.3,))),
    "every page": lambda layer, rule: replace(rule, pages=replace(rule.pages, selection="all", fractions=(), anchor_every=1)),
}


@pytest.fixture(scope="module")
def model(weights, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("evaluated") / "llama", weights, tokenizer=True)


@pytest.fixture(scope="module")
def texts():
    return random_texts()


def served(model, **arguments):
    return ServedCheckpoint(str(model), None, "cpu", EngineOptions(arguments, {"window": WINDOW}), None)


@pytest.fixture(scope="module")
def result(model, texts):
    return evaluate_served(served(model), texts, OPTIONS, None, SILENT)


@pytest.fixture(scope="module")
def rows(result):
    return {row["cache"]: row for row in result["rows"]}


@pytest.fixture(scope="module")
def in_transformers(model, texts):
    with losses_in_transformers(model, texts) as losses:
        yield losses


@pytest.mark.parametrize("cache", ["C=3", "int4"])
def test_losses_are_those_of_transformers(rows, in_transformers, cache):
    row, losses, in_float32 = rows[cache], in_transformers(rows[cache]), in_transformers(rows[cache], dtype=torch.float32)
    assert difference(in_float32.kl.mean, losses.kl.mean) < TOLERANCE / 10
    assert difference(row["kl"]["mean"], losses.kl.mean) < TOLERANCE
    assert row["ppl_change_percent"]["mean"] == pytest.approx(losses.ppl_change_percent.mean, abs=0.1)
    assert row["top1_percent"]["mean"] == pytest.approx(losses.top1_percent.mean, abs=1.1)  # a token of a window
    assert row["full_ppl"] == pytest.approx(losses.full_ppl, rel=1e-5)


@pytest.mark.parametrize(
    ("cache", "other"),
    [*((cache, name) for cache in ("C=3", "int4") for name in RULES), *(("C=3", name) for name in SELECTIONS)],
)
def test_another_rule_is_noticed(rows, in_transformers, cache, other):
    losses = in_transformers(rows[cache], (RULES | SELECTIONS)[other])
    assert difference(rows[cache]["kl"]["mean"], losses.kl.mean) > 5 * TOLERANCE


def test_a_result_says_what_served(result, rows):
    evaluation = EvaluationResult.from_dict(json.loads(json.dumps(result)))
    assert evaluation.complete and evaluation.model_name == f"llama in vLLM {result['engine']['version']}"
    assert evaluation.engine.options == {"additional_config": {"elastickv": {"window": WINDOW}}}
    backends = [getattr(evaluation.engine, name)["backends"] for name in ("reference", "served")]
    assert [all("elastickv" in name for name in each) for each in backends] == [False, True]
    assert result["skipped"] == ["C=1 is not measured through vLLM: its own cache is what the others are compared with"]
    assert "pages=" in rows["C=3"]["recipes"][0] and rows["C=3"]["read_ratio"] >= 3
    assert rows["int4"]["stored_format"]["exact_keys"] == WINDOW
    assert evaluation.model_name in fidelity_tables(evaluation)


def test_greedy_texts_are_compared(rows):
    assert all(len(row["greedy"]["first_different"]) == 2 for row in rows.values())


def test_two_ranks_lose_as_one_does(model, texts, rows):
    """Logits are gathered from both, and each reads the pages of its own KV head."""
    result = evaluate_served(served(model, tensor_parallel_size=2), texts, replace(OPTIONS, formats=()), None, SILENT)
    assert [result["engine"][name]["tensor_parallel_size"] for name in ("reference", "served")] == [2, 2]
    assert all("elastickv" in name for name in result["engine"]["served"]["backends"])
    (row,), one = result["rows"], rows["C=3"]
    assert difference(row["kl"]["mean"], one["kl"]["mean"]) < TOLERANCE
    assert row["greedy"] == one["greedy"] and row["recipes"] == one["recipes"]


def test_what_vllm_refuses_is_one_line(model, texts):
    with pytest.raises(UsageError, match=r"vLLM does not run this model with these options: .*swap") as raised:
        evaluate_served(served(model, swap="no"), texts, OPTIONS, None, SILENT)
    assert "\n" not in str(raised.value)
