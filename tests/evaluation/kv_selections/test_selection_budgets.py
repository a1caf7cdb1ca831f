"""Bytes of every selection against a count by hand, and the size that a budget gives it."""

import re
from pathlib import Path

import pytest

from elastickv.errors import UsageError
from elastickv.evaluation.kv_selections.published_selections import SELECTIONS, parse_selections
from elastickv.evaluation.kv_selections.reference_selection import plan_selection, token_bytes
from elastickv.evaluation.recipes_by_ratio import Span

TOKEN = 4 * 64  # a key and a value of 64 channels in 16 bits
SPAN = Span(4000, 95)

# Bytes that one head reads, and stores, at 1000 tokens after a prompt of 990, with a size of 40.
BY_HAND = {
    "streaming_llm": (40 * TOKEN, 40 * TOKEN),
    # 63 pages, of which the newest has 8 tokens: 39 complete pages, the newest, and the bounds of 62.
    "quest": ((39 * 16 + 8 + 62) * TOKEN, (1000 + 63) * TOKEN),
    "quest_every_layer": ((39 * 16 + 8 + 62) * TOKEN, (1000 + 63) * TOKEN),
    "snapkv": ((40 + 10) * TOKEN, (40 + 10) * TOKEN),
    "h2o": (40 * TOKEN + 39 * 4, 40 * (TOKEN + 4)),
}


def test_every_selection_is_counted():
    assert BY_HAND.keys() == SELECTIONS.keys()


@pytest.mark.parametrize("name", SELECTIONS)
def test_tokens_bounds_and_sums_of_attention_are_counted(name):
    selection = SELECTIONS[name]
    assert token_bytes(64) == TOKEN
    assert (selection.read_bytes(40, 1000, 990, 64), selection.stored_bytes(40, 1000, 990, 64)) == BY_HAND[name]


def test_quest_reads_no_bounds_while_it_reads_everything():
    assert SELECTIONS["quest"].read_bytes(40, 640, 600, 64) == 640 * TOKEN
    assert SELECTIONS["quest"].read_bytes(40, 641, 600, 64) == (39 * 16 + 1 + 40) * TOKEN


@pytest.mark.parametrize("compress", [1.5, 4.0, 8.0])
@pytest.mark.parametrize("name", SELECTIONS)
def test_a_budget_is_met_and_one_more_would_exceed_it(name, compress):
    selection, layers = SELECTIONS[name], 80
    chosen = plan_selection(selection, compress, SPAN, layers, 64)
    steps = range(4001, 4096)
    dense = TOKEN * sum(steps)

    def read(size):
        selected = sum(selection.read_bytes(size, tokens, 4000, 64) for tokens in steps)
        return chosen.dense_layers * dense + (layers - chosen.dense_layers) * selected

    assert chosen.dense_bytes == layers * dense and chosen.bytes_read == read(chosen.size)
    assert read(chosen.size) * compress <= layers * dense < read(chosen.size + 1) * compress


def test_the_first_two_layers_of_quest_read_everything_out_of_the_same_budget():
    published, everywhere = (plan_selection(SELECTIONS[name], 4.0, SPAN, 30, 64) for name in ("quest", "quest_every_layer"))
    assert (published.dense_layers, everywhere.dense_layers) == (2, 0) and published.size < everywhere.size
    assert plan_selection(SELECTIONS["quest"], 1.5, SPAN, 2, 64).dense_layers == 1, "never more than half of the layers"


def test_a_budget_that_the_least_size_exceeds_is_refused():
    """The bounds alone are a sixteenth of the bytes."""
    with pytest.raises(UsageError, match=r"^selection quest_every_layer cannot read 1/16 of 4000 tokens: give a smaller C"):
        plan_selection(SELECTIONS["quest_every_layer"], 16.0, SPAN, 30, 64)
    with pytest.raises(UsageError, match=r"^selection snapkv cannot read 1/64 of 4000 tokens"):
        plan_selection(SELECTIONS["snapkv"], 64.0, SPAN, 30, 64)


def test_names_are_read_from_a_list():
    assert parse_selections(None) == () and parse_selections("all") == tuple(SELECTIONS)
    assert parse_selections("h2o, quest,h2o") == ("h2o", "quest")


@pytest.mark.parametrize("text", ["quests", "h2o,", "", "KnormPress"])
def test_an_unknown_selection_is_one_line_with_all_names(text):
    named = r"^selection \S.* is unknown: choose all, streaming_llm, quest, .*, kvpress:NAME with a scorer of kvpress"
    with pytest.raises(UsageError, match=named) as error:
        parse_selections(text)
    assert "\n" not in str(error.value)


def test_the_table_in_the_documents_has_every_selection():
    text = (Path(__file__).parents[3] / "docs" / "fidelity.md").read_text(encoding="utf-8")
    section = text.partition("## Selections")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(SELECTIONS)
