"""Texts of every cache after the same prefill: what is the same, what differs, and what degenerates."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from elastickv.errors import UsageError
from elastickv.evaluation.evaluate import evaluate
from elastickv.evaluation.generations.continuation_options import ContinuationOptions
from elastickv.evaluation.generations.continuations import continuations
from elastickv.evaluation.generations.text_figures import text_figures
from elastickv.evaluation.generations.token_choice import TokenChoice
from elastickv.evaluation.prefill import Prefill, prefill
from elastickv.evaluation.sessions import stock
from elastickv.results.formats.fidelity_table import fidelity_tables
from elastickv.results.kinds.evaluation_result import EvaluationResult
from tests.evaluation.test_evaluate import OPTIONS, TEXTS, Silent
from tests.evaluation.test_mixed_layers import convolutional
from tests.evaluation.test_mixed_layers import loaded as of_config
from tests.helpers.tiny_models import tiny_llama

GENERATING = replace(
    OPTIONS,
    ratios=(1.0, 2.0),
    contexts=(500,),
    needle_lengths=(),
    greedy_tokens=0,
    tolerance=None,
    formats=("kivi2",),
    selections=("snapkv",),
    generation=ContinuationOptions(tokens=12, samples=2),
)


@pytest.fixture(scope="module")
def loaded():
    return tiny_llama()


@pytest.fixture(scope="module")
def result(loaded):
    return evaluate(loaded, TEXTS, GENERATING, None, Silent())


@pytest.fixture(scope="module")
def rows(result):
    return {row["cache"]: row for row in result["generations"]}


def test_every_recipe_format_and_selection_generates_after_full_attention(result, rows):
    assert list(rows) == ["full", *(row["cache"] for row in result["rows"])] and "kivi2" in rows and "snapkv C=2" in rows
    assert all(row["greedy"]["texts"] == 2 and row["sampled"]["texts"] == 4 for row in rows.values())


def test_without_compression_the_texts_are_full_attentions(rows):
    for how in ("greedy", "sampled"):
        figures = rows["C=1"][how]
        assert figures["first_different"] == {"mean": 12, "low": 12, "high": 12}
        assert figures["repetition"]["difference"] == {"mean": 0, "low": 0, "high": 0}
        assert figures["repetition_rates"] == rows["full"][how]["repetition_rates"]
    assert rows["C=1"]["sampled"]["self_bleu"]["mean"] == rows["full"]["sampled"]["self_bleu"]["mean"]


def test_a_coarse_cache_leaves_full_attentions_texts(rows):
    assert rows["C=2"]["sampled"]["first_different"]["mean"] < 12
    assert rows["full"]["sampled"]["first_different"] is None and rows["full"]["greedy"]["self_bleu"] is None


def test_the_result_is_read_again_and_shown(result):
    shown = fidelity_tables(EvaluationResult.from_dict(result))
    lines = [line for line in shown.splitlines() if "sampled" in line]
    assert len(lines) == len(result["generations"]) and "self-BLEU" in shown


def test_a_sample_needs_no_other_sample_and_none_is_needed(loaded):
    """One sample has no other one to be compared with; with none there are greedy texts alone."""
    for samples in (0, 1):
        options = replace(GENERATING, ratios=(1.0,), formats=(), selections=(), generation=ContinuationOptions(3, samples))
        (full, one) = evaluate(loaded, TEXTS, options, None, Silent())["generations"]
        assert one["greedy"]["first_different"]["mean"] == 3
        assert (one["sampled"] is None) if samples == 0 else one["sampled"]["self_bleu"] is None
        assert full["samples"] == samples


def test_layers_with_a_state_are_copied_for_every_row():
    model = of_config(convolutional()).model
    rows = [tuple(range(40)), tuple(range(40, 80))]
    start = prefill(model, rows, 30, 5)
    each = torch.tensor([30, 70])
    with stock(model, start) as session:
        alone = session.step(each)
    with stock(model, start.repeated(3)) as session:
        together = session.step(each.repeat_interleave(3))
    torch.testing.assert_close(together, alone.repeat_interleave(3, 0), rtol=1e-4, atol=1e-4)
    assert start.repeated(3).rows == 6


def test_texts_longer_than_the_model_has_positions_for_are_refused(loaded):
    with pytest.raises(UsageError, match="positions"):
        evaluate(loaded, TEXTS, replace(GENERATING, generation=ContinuationOptions(tokens=4000)), None, Silent())


def test_after_an_interrupt_finished_rows_remain(loaded):
    class Interrupting(Silent):
        def phase(self, name):
            if name.startswith("C=2 generates"):
                raise KeyboardInterrupt

    options = replace(GENERATING, formats=(), selections=())
    interrupted = evaluate(loaded, TEXTS, options, None, Interrupting())
    assert not interrupted["complete"] and len(interrupted["rows"]) == 2
    assert [row["cache"] for row in interrupted["generations"]] == ["full", "C=1"]


class Looping:
    """A model that says the numbers from 0 on, and from some step on the same three tokens over and over."""

    def __init__(self, loops_from):
        self.loops_from, self.step_number = loops_from, 0

    def step(self, ids):
        number, self.step_number = self.step_number, self.step_number + 1
        token = number if number < self.loops_from else number % 3
        return 50.0 * torch.nn.functional.one_hot(torch.full((len(ids),), token), 1000).float()


def spoken(loops_from, tokens=400, ends=()):
    @contextmanager
    def decoding(*_):
        yield Looping(loops_from)

    choose = TokenChoice(ContinuationOptions(tokens=tokens, samples=1), 2, torch.device("cpu"))
    start = Prefill([], [], torch.zeros(4, 0, 1000))
    return continuations([0] * 4, start, decoding, tokens, None, choose, ends)


@pytest.mark.parametrize(("loops_from", "least", "most"), [(0, 0.99, 1.0), (280, 0.2, 0.4)])
def test_a_text_that_degenerates_shows(loops_from, least, most):
    """From the beginning the rate is near 1; at the end alone it is low, and the loop counts."""
    texts = [[row] for row in spoken(loops_from).tolist()]
    healthy = [[row] for row in spoken(400).tolist()]
    figures = text_figures(texts, healthy, 400)
    assert least < figures.repetition.mean.mean < most and figures.loops == 4
    assert figures.repetition.difference.low == figures.repetition.mean.mean
    assert figures.first_different.mean == max(3, loops_from)
    assert text_figures(healthy, healthy, 400).loops == 0


def test_generation_stops_when_all_texts_have_ended():
    assert spoken(400, ends={20}).shape == (4, 64)
