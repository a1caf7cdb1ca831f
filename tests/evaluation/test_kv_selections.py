"""Selections through the evaluation: sessions, the command's result, its tables, files of earlier versions."""

import json
from dataclasses import replace

import pytest
import torch

from elastickv.errors import UsageError
from elastickv.evaluation import sessions
from elastickv.evaluation.evaluate import EvaluationOptions, evaluate
from elastickv.evaluation.kv_selections.published_selections import SELECTIONS
from elastickv.evaluation.kv_selections.reference_selection import SelectionPlan
from elastickv.evaluation.prefill import prefill
from elastickv.results.formats import plain_json
from elastickv.results.formats.fidelity_table import fidelity_tables
from elastickv.results.kinds.evaluation_result import EvaluationResult
from tests.evaluation.test_evaluate import TEXTS, Silent
from tests.evaluation.test_mixed_layers import convolutional, windowed
from tests.evaluation.test_mixed_layers import loaded as of_config
from tests.helpers.tiny_models import tiny_llama

OPTIONS = EvaluationOptions(
    ratios=(1.0, 1.5),
    contexts=(400,),
    window_count=2,
    scored=6,
    needle_lengths=(450,),
    needle_depths=1,
    greedy_tokens=2,
    selections=("streaming_llm", "quest_every_layer", "snapkv", "h2o"),
)
ROWS = [tuple(range(60)), tuple(range(40, 100))]


@pytest.fixture(scope="module")
def loaded():
    return tiny_llama()


@pytest.fixture(scope="module")
def result(loaded):
    return evaluate(loaded, TEXTS, OPTIONS, None, Silent())


def logits(decoding):
    with decoding as session:
        return torch.stack([session.step(torch.tensor([i, i + 1])) for i in range(3)])


def chosen(name, size, dense_layers=0):
    return SelectionPlan(SELECTIONS[name], 2.0, size, dense_layers, 1, 1, 1)


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_selection_that_reads_everything_is_the_stock_cache(loaded, name):
    start = prefill(loaded.model, ROWS, 50, 5)
    before = loaded.model.config._attn_implementation
    scores = dict.fromkeys((0, 1), torch.ones(2, 1, 50))
    stock = logits(sessions.stock(loaded.model, start))
    everything = logits(sessions.selected(loaded.model, chosen(name, 100), scores, start))
    # The stock cache holds float32, the selection's layers bfloat16.
    assert 0 < (stock - everything).abs().max() < 0.02 * stock.abs().max()
    assert loaded.model.config._attn_implementation == before
    few = logits(sessions.selected(loaded.model, chosen(name, 3 if "quest" in name else 8), scores, start))
    assert not torch.equal(few, everything)


def test_layers_that_read_everything_are_the_first(loaded):
    start = prefill(loaded.model, ROWS, 50, 5)
    few, half, everything = (
        logits(sessions.selected(loaded.model, chosen("streaming_llm", 8, dense), {}, start)) for dense in (0, 1, 2)
    )
    whole = logits(sessions.selected(loaded.model, chosen("streaming_llm", 100), {}, start))
    assert (everything - whole).abs().max() < 1e-4 * whole.abs().max()
    assert not torch.equal(half, few) and not torch.equal(half, everything)


def test_every_selection_is_a_row_at_each_c_above_1(result):
    names = [f"{name} C=1.5" for name in OPTIONS.selections]
    assert [row["cache"] for row in result["rows"]] == ["C=1", "C=1.5", *names]
    rows = {row["cache"]: row for row in result["rows"][2:]}
    assert all(row["compress"] is None and row["selection"]["compress"] == 1.5 for row in rows.values())
    assert all(row["scored_tokens"] == 12 and row["greedy"]["tokens"] == 2 for row in rows.values())
    assert {row["selection"]["unit"] for row in rows.values()} == {"tokens", "pages"}


def test_bytes_are_within_the_budget_and_counted(result):
    rows = {row["cache"]: row for row in result["rows"][2:]}
    dense = 2 * 256 * sum(range(394, 400)) / 6  # two layers, a key and a value of 64 channels
    for row in rows.values():
        assert 1.5 <= row["read_ratio"] == pytest.approx(dense / row["step_bytes_read"])
        assert row["stored_ratio"] == pytest.approx(2 * 256 * 399 / row["bytes_stored"])
    # 393 tokens of a prompt: two thirds of the 396.5 that a step has on average are 264.
    assert rows["streaming_llm C=1.5"]["selection"]["size"] == 264
    assert rows["snapkv C=1.5"]["selection"]["size"] == 260, "3.5 more on average follow the prompt"
    assert rows["quest_every_layer C=1.5"]["stored_ratio"] == pytest.approx(399 / (399 + 25))


def test_pass_keys_are_looked_for_with_every_selection(result):
    assert list(result["needle"][0]["found"])[3:] == [f"{name} C=1.5" for name in OPTIONS.selections]


def test_the_result_is_json_and_a_table_of_selections(result):
    read = EvaluationResult.from_dict(json.loads(plain_json.dumps(result)))
    assert read.rows[2].selection.method == "streaming_llm" and read.options["selections"] == list(OPTIONS.selections)
    shown = fidelity_tables(read)
    for named in ("| selection ", "264 tokens", "arXiv 2406.10774", "bytes read", "h2o C=1.5"):
        assert named in shown


def test_files_of_earlier_versions_have_no_selection(result):
    old = json.loads(plain_json.dumps(result))
    old["rows"] = old["rows"][:2]
    for row in old["rows"]:
        row.pop("selection", None)
    assert [row.selection for row in EvaluationResult.from_dict(old).rows] == [None, None]


def test_a_budget_that_a_selection_cannot_meet_is_left_out(loaded):
    options = replace(OPTIONS, selections=("quest", "streaming_llm"), ratios=(1.95,), needle_lengths=(), greedy_tokens=0)
    result = evaluate(loaded, TEXTS, options, None, Silent())
    assert [row["cache"] for row in result["rows"]] == ["C=1.95", "streaming_llm C=1.95"]
    assert result["skipped"] == [
        "selection quest cannot read 1/1.95 of 393 tokens: give a smaller C or a longer context, or leave it out"
    ]


@pytest.mark.parametrize("ratios", [(), (1.0,)])
def test_selections_without_a_budget_are_refused(loaded, ratios):
    options = replace(OPTIONS, ratios=ratios, formats=("q8_0",))
    with pytest.raises(UsageError, match="`selections` need a budget: give values of C above 1 in `compress`"):
        evaluate(loaded, TEXTS, options, None, Silent())


@pytest.mark.parametrize("config", [windowed, convolutional])
def test_layers_without_full_attention_keep_their_own_cache(config):
    """One of two layers has full attention, so bytes are those of one layer."""
    options = replace(OPTIONS, ratios=(1.5,), needle_lengths=(), greedy_tokens=0)
    result = evaluate(of_config(config()), TEXTS, options, None, Silent())
    rows, dense = result["rows"][1:], 4 * result["model"]["head_dim"] * 396.5
    assert [row["selection"]["method"] for row in rows] == list(OPTIONS.selections)
    assert all(row["read_ratio"] == pytest.approx(dense / row["step_bytes_read"]) for row in rows)
    assert all(row["kl"]["mean"] > 0 for row in rows)


@pytest.mark.parametrize("name", SELECTIONS)
def test_several_tokens_at_once_are_as_many_steps(loaded, name):
    start = prefill(loaded.model, ROWS, 30, 5)
    scores = {layer: torch.rand(2, 1, 30, generator=torch.Generator().manual_seed(layer)) for layer in (0, 1)}
    plan = chosen(name, 3 if "quest" in name else 12)
    ids = torch.tensor(ROWS)[:, 30:]
    with sessions.selected(loaded.model, plan, scores, start) as session:
        together = session.read(ids)
    with sessions.selected(loaded.model, plan, scores, start) as session:
        steps = torch.stack([session.step(token) for token in ids.T], 1)
    with sessions.stock(loaded.model, start) as session:
        everything = torch.stack([session.step(token) for token in ids.T], 1)
    # Other orders of addition round some keys and values to the next 16-bit number.
    assert (together - steps).abs().mean() < 0.01 * (steps - everything).abs().mean()
