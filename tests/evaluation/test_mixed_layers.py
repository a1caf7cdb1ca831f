"""Models whose layers differ: those with full attention are compressed, the others keep Transformers' own cache."""

import json

import pytest
import torch
import transformers

from elastickv.errors import UsageError
from elastickv.evaluation import sessions
from elastickv.evaluation.calibrate import calibrate
from elastickv.evaluation.evaluate import evaluate
from elastickv.evaluation.evaluation_options import EvaluationOptions
from elastickv.evaluation.prefill import TOKENS_AT_ONCE, prefill
from elastickv.evaluation.scoring import score
from elastickv.evaluation.texts import Text, windows
from elastickv.recipe import ModelCalibration, Recipe
from elastickv.results.formats.fidelity_table import fidelity_tables
from elastickv.results.kinds.evaluation_result import EvaluationResult
from elastickv.transformers.model_loading import Loaded
from tests.evaluation.test_evaluate import TEXTS, Silent
from tests.helpers.tiny_models import TEXT, framing_tokenizer

COMMON = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 4096, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
OPTIONS = EvaluationOptions(ratios=(1.0, 2.0), contexts=(600,), window_count=2, scored=8, needle_lengths=(), greedy_tokens=2)


def windowed(**changes):
    kinds = {"sliding_window": 48, "layer_types": ["sliding_attention", "full_attention"]}
    return transformers.Gemma3TextConfig(**COMMON, head_dim=64, **(kinds | changes))


def convolutional():
    return transformers.Lfm2Config(**COMMON, layer_types=["conv", "full_attention"])


def loaded(config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return Loaded("tiny", model, framing_tokenizer(("<s>",)))


@pytest.fixture(scope="module")
def gemma():
    return loaded(windowed())


@pytest.fixture(scope="module")
def result(gemma):
    calibration = calibrate(gemma, Text("other", TEXT[1000:3000]), 1000)
    assert (calibration.layers, calibration.kv_heads, calibration.prefix) == ((1,), 1, (1,))
    assert ModelCalibration.loads(calibration.dumps()) == calibration
    return evaluate(gemma, TEXTS, OPTIONS, calibration, Silent())


@pytest.mark.parametrize("at_once", [7, 40, 250, 290, 291, 600])
def test_long_rows_are_read_in_parts_and_give_the_same(gemma, monkeypatch, at_once):
    """Of 300 tokens the last part has the 10 logits at least. One layer's window is of 48 tokens."""
    rows = [tuple(map(ord, TEXT[begin : begin + 300])) for begin in (0, 300)]
    whole = prefill(gemma.model, rows, 290, 10)
    reads = []
    handle = gemma.model.register_forward_pre_hook(
        lambda _, __, inputs: reads.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    monkeypatch.setitem(TOKENS_AT_ONCE, "cpu", at_once)
    try:
        parts = prefill(gemma.model, rows, 290, 10)
    finally:
        handle.remove()
    assert sum(reads) == 2 * 300 and len(reads) == 2 * (1 + 290 // at_once) and reads[-1] >= 10
    for name in ("keys", "values"):
        for of_parts, of_whole in zip(getattr(parts, name), getattr(whole, name), strict=True):
            torch.testing.assert_close(of_parts, of_whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts.logits, whole.logits, rtol=1e-4, atol=1e-5)


def plain_perplexity(loaded, result):
    """Without any code of ours: one pass over each window, beginning-of-sequence token first."""
    losses = []
    for window in result["windows"]:
        text = dict(zip(("letters", "srettel"), TEXTS, strict=True))[window["text"]].content
        first, end = window["first"], window["scored_end"]
        ids = torch.tensor([[1, *map(ord, text[first:end])]])
        with torch.inference_mode():
            logits = loaded.model(input_ids=ids, use_cache=False).logits[0].double()
        losses += torch.nn.functional.cross_entropy(logits[-9:-1], ids[0, -8:], reduction="none").tolist()
    return torch.tensor(losses, dtype=torch.float64).mean().exp().item()


def test_dense_decoding_is_what_the_model_computes(gemma, result):
    one, two = result["rows"]
    assert one["full_ppl"] == pytest.approx(plain_perplexity(gemma, result), rel=1e-5)
    assert one["kl"]["mean"] < 1e-8 and one["read_ratio"] == 1
    assert two["kl"]["mean"] > 1e-8 and two["read_ratio"] >= 2
    assert len(two["recipes"]) == 1 and one["greedy"]["same_rows"] == 2


def test_the_result_says_which_layers_are_compressed_and_how_windows_begin(result):
    assert (result["model"]["layers"], result["model"]["elastic_layers"]) == (2, 1)
    assert result["prefix"] == {"ids": [1], "text": "<s>"}
    assert result["windows"][0] == {
        "text": "letters", "context": 600, "first": 0, "prefix_tokens": 1, "context_tokens": 592, "scored_first": 591,
        "scored_end": 599,
    }  # fmt: skip
    assert result["scored_texts"][1] == {"name": "srettel", "tokens": 6000, "windows": 1, "scored_tokens": 8}
    shown = fidelity_tables(EvaluationResult.from_dict(json.loads(json.dumps(result))))
    for said in ("1 of 2 layers have full attention", "begins with `<s>` (1)", "the last 8 are scored, after 592 of context"):
        assert said in shown


def test_one_window_lists_one_text_and_has_no_interval(gemma):
    options = EvaluationOptions(
        ratios=(1.0,), contexts=(600,), window_count=1, scored=8, needle_lengths=(), greedy_tokens=0, tolerance=None
    )
    result = evaluate(gemma, [TEXTS[0], Text("short", "8 tokens")], options, None, Silent())
    assert result["texts"] == ["letters"] and [text["name"] for text in result["scored_texts"]] == ["letters"]
    assert result["skipped"] == ["text short: not scored, as there are fewer windows (1) than texts"]
    shown = fidelity_tables(EvaluationResult.from_dict(result))
    assert "One window alone has no interval." in shown
    (row,) = [line for line in shown.splitlines() if "C=1" in line]
    assert "[" not in row


def test_texts_that_only_hide_pass_keys_are_listed(gemma):
    options = EvaluationOptions(
        ratios=(1.0,),
        contexts=(),
        window_count=0,
        scored=1,
        needle_lengths=(450,),
        needle_depths=1,
        needle_texts=2,
        greedy_tokens=0,
    )
    result = evaluate(gemma, TEXTS, options, None, Silent())
    assert result["texts"] == ["letters", "srettel"] and result["skipped"] == []
    assert result["scored_texts"] == result["windows"] == [] and len(result["needle"][0]["depths"]) == 2


def test_a_state_without_keys_is_continued_from_where_decoding_starts():
    model = loaded(convolutional()).model
    rows = windows(TEXTS, framing_tokenizer(("<s>",)), 300, 2)
    start = prefill(model, [row.ids[:-1] for row in rows], 291, 8)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([row.ids[:-1] for row in rows]), use_cache=False).logits[:, -8:]
    torch.testing.assert_close(start.logits, logits, rtol=1e-4, atol=1e-4)
    for _ in range(2):  # the state is copied: a second session starts where the first one did
        exact = score(rows, start, lambda begun, n: sessions.elastic(model, [Recipe.parse("dense")], begun, n))
        assert exact.kl.mean() < 1e-8
    assert score(rows, start, lambda begun, n: sessions.elastic(model, [Recipe.parse("int4")], begun, n)).kl.mean() > 1e-8


def test_a_model_that_cannot_be_compressed_is_one_line():
    everywhere = windowed(layer_types=["sliding_attention"] * 2)
    with pytest.raises(UsageError, match="every layer of tiny attends to a window"):
        evaluate(loaded(everywhere), TEXTS, OPTIONS, None, Silent())


def test_the_frameworks_quantized_cache_is_refused_where_it_serves_no_windows(gemma):
    options = EvaluationOptions(
        ratios=(1.0,), contexts=(600,), window_count=2, scored=8, needle_lengths=(), greedy_tokens=0, reference=True
    )
    with pytest.raises(UsageError, match="full attention in every layer, and Gemma3ForCausalLM has others"):
        evaluate(gemma, TEXTS, options, None, Silent())
