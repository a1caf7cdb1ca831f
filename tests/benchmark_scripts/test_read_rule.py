"""The read rule as an attention function: what a query reads exactly, and what it reads as pages store it."""

import importlib
import sys
from pathlib import Path

import pytest

from elastickv.recipe import Recipe

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from elastickv.kvcache.quantize import stored_values  # noqa: E402
from tests.helpers.tiny_models import tiny_llama  # noqa: E402

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
INT4, INT8, DENSE = (Recipe.parse(text) for text in ("int4", "int8", "dense"))
TOKENS, WINDOW = 300, 64


@pytest.fixture
def read_rule(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("read_rule")
    sys.modules.pop("read_rule", None)


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(heads, TOKENS, 64, generator=generator) for heads in (4, 2, 2)]


def expected(query, keys, values):
    """Attention of one query of one head, in float64."""
    return (keys @ query.double() * 0.125).softmax(0) @ values


def pages_of(fmt, offset=0):
    def stored(rows, value):
        end = offset + (len(rows) - offset) // 32 * 32
        numbers = rows.double().clone()
        numbers[offset:end] = torch.from_numpy(stored_values(rows[offset:end].numpy(), fmt, value, 64))
        return numbers

    return stored


@pytest.mark.parametrize("position", [0, 3, WINDOW - 1, WINDOW, 100, 255, 256, TOKENS - 1])
@pytest.mark.parametrize("sinks", [0, 4])
def test_a_query_reads_the_newest_tokens_exactly_and_all_others_from_pages(read_rule, tensors, position, sinks):
    query, key, value_rows = tensors
    outputs = read_rule.ReadRule(INT4, WINDOW, sinks=sinks).attend(query, key, value_rows, 0.125)
    old = torch.arange(position + 1) <= position - WINDOW
    old[:sinks] = False
    for head in range(4):
        read = []
        for value, rows in enumerate((key[head // 2], value_rows[head // 2])):
            # The page of a token that is read from it was complete: pages are those of the whole sequence.
            stored = pages_of("int4", sinks)(rows, bool(value))
            read.append(torch.where(old[:, None], stored[: position + 1], rows[: position + 1].double()))
        reference = expected(query[head, position], *read)
        assert torch.allclose(outputs[head, position].double(), reference, atol=1e-5)


@pytest.mark.parametrize("recipe", ["int4", "int4,pages=1/4"])
def test_a_model_in_bfloat16_reads_as_its_numbers_do_in_float32(read_rule, tensors, recipe):
    """But for the rounding of outputs: scores are not rounded."""
    rule = read_rule.ReadRule(Recipe.parse(recipe), WINDOW)
    query, key, value = (10 * tensor.bfloat16() for tensor in tensors)
    outputs = rule.attend(query, key, value, 0.125, prompt=TOKENS // 2)
    assert outputs.dtype == torch.bfloat16
    assert torch.equal(outputs, rule.attend(query.float(), key.float(), value.float(), 0.125, prompt=TOKENS // 2).bfloat16())


def test_the_first_page_may_have_formats_of_its_own(read_rule, tensors):
    rows = tensors[1]
    for value in (False, True):
        plain = read_rule.ReadRule(INT4, WINDOW).stored(rows, value)
        finer = read_rule.ReadRule(INT4, WINDOW, first_page=INT8).stored(rows, value)
        exact = read_rule.ReadRule(INT4, WINDOW, first_page=DENSE).stored(rows, value)
        assert torch.equal(finer[:, 32:], plain[:, 32:]) and torch.equal(exact[:, 32:], plain[:, 32:])
        assert torch.equal(exact[:, :32], rows[:, :32])
        error, coarse = ((stored - rows)[:, :32].abs().mean() for stored in (finer, plain))
        assert 0 < error < coarse / 4


def test_pages_begin_after_the_sinks_and_an_incomplete_one_is_not_stored(read_rule, tensors):
    rows = tensors[1]
    stored = read_rule.ReadRule(INT4, WINDOW, sinks=4).stored(rows, False)
    assert torch.equal(stored[:, :4], rows[:, :4]) and torch.equal(stored[:, 4 + 9 * 32 :], rows[:, 4 + 9 * 32 :])
    assert torch.equal(stored[0].double(), pages_of("int4", 4)(rows[0], False))


def test_a_page_that_turns_old_as_a_whole_leaves_up_to_31_tokens_more_exact(read_rule):
    rule = read_rule.ReadRule(INT4, 128, sinks=4, page_window=True)
    lengths = torch.arange(1, 500)
    first = rule.first_exact(lengths - 1)
    assert torch.equal((first - 4) % 32, torch.zeros_like(first))
    assert set((lengths - first)[lengths > 300].tolist()) == set(range(128, 160))


def test_a_model_that_reads_everything_exactly_is_the_model_itself_and_gets_its_attention_back(read_rule):
    model = tiny_llama().model
    ids = torch.arange(TOKENS)[None] * 7 % 128
    before = model.config._attn_implementation
    with torch.inference_mode():
        full = model(ids).logits
        with read_rule.reading(model, read_rule.ReadRule(INT4, 2048)):
            same = model(ids).logits
        with read_rule.reading(model, read_rule.ReadRule(INT4, WINDOW)):
            other = model(ids).logits
        assert torch.equal(model(ids).logits, full)
    assert model.config._attn_implementation == before
    assert torch.allclose(same, full, atol=1e-3)
    assert torch.allclose(other[:, :WINDOW], full[:, :WINDOW], atol=1e-3) and (other - full)[:, WINDOW:].abs().max() > 0.1


def test_a_window_smaller_than_a_page_is_refused(read_rule):
    with pytest.raises(ValueError, match="smaller than a page"):
        read_rule.ReadRule(INT4, 31)
