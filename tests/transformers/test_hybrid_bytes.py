"""Models with windowed layers: ratios are of the elastic layers, and of all layers."""

import pytest
import torch

import elastickv.transformers as ekv
from elastickv.model_benchmark import generation
from elastickv.model_benchmark.records import cache_record
from elastickv.transformers.cache_argument import CACHE_ARGUMENT
from tests.helpers.model_matrix import WINDOW, model, prompt

TOKENS = 300
IDS = prompt(1, TOKENS)["input_ids"]


def report_of(name, decodes=0):
    tiny = model(name).to(torch.bfloat16)
    cache = ekv.ElasticCache.for_model(tiny, recipe="int8")
    with torch.no_grad():
        tiny(IDS, **{CACHE_ARGUMENT: cache})
        for _ in range(decodes):
            tiny(IDS[:, :1], **{CACHE_ARGUMENT: cache})
    return cache.report()


@pytest.mark.parametrize(("name", "of_layers"), [("gemma3", " of the elastic layers"), ("llama", "")])
def test_bytes_that_decodes_read_say_whose_they_are(name, of_layers):
    assert f" bytes{of_layers}, " in next(line for line in str(report_of(name, 2)).splitlines() if "2 decodes read" in line)


def test_a_hybrids_report_has_both_ratios():
    report = report_of("gemma3")
    windowed = 2 * (WINDOW - 1) * 2 * 64 * 2  # keys and values, tokens, KV heads, channels, bytes
    assert report.stock_bytes == report.stock_dense_bytes == windowed
    assert report.model_stored_ratio == (report.dense_bytes + windowed) / (report.stored_bytes + windowed)
    assert 1 < report.model_stored_ratio < report.stored_ratio
    text = str(report)
    assert f"elastic layers hold [{TOKENS}] tokens in {report.stored_bytes} bytes, {report.stored_ratio:.2f}x less" in text
    assert f"all layers hold {report.stored_bytes + windowed} bytes, {report.model_stored_ratio:.2f}x less than dense" in text


def test_stock_layers_in_32_bit_count_half_as_dense():
    tiny = model("gemma3")
    cache = ekv.ElasticCache.for_model(tiny, recipe="int8")
    with torch.no_grad():
        tiny(IDS, **{CACHE_ARGUMENT: cache})
    report = cache.report()
    assert report.stock_bytes == 2 * report.stock_dense_bytes > 0


def test_the_report_of_a_model_with_full_attention_alone_says_it_once():
    report = report_of("llama")
    assert report.model_stored_ratio == report.stored_ratio
    assert f"  holds [{TOKENS}] tokens in" in str(report) and "all layers hold" not in str(report)


@pytest.mark.parametrize("name", ["gemma3", "llama"])
@pytest.mark.parametrize("kind", ["stock", "elastic"])
def test_measured_bytes_are_compared_with_those_of_the_same_layers(name, kind):
    tiny = model(name)
    sampling, mask = generation.Sampling(), torch.ones_like(IDS)
    if kind == "stock":
        made = generation.stock(tiny, IDS, mask, sampling)
    else:
        made = generation.elastic(tiny, IDS, mask, sampling, TOKENS + 12, {"recipe": "int8"})
    for _ in range(3):
        made.advance(4)
    made.footprint._held, made.footprint.source = 900_000, "test"
    record = cache_record(made, weights_bytes=1, read_ceiling_gbs=1.0)
    windowed = 2 * (WINDOW - 1) * 2 * 64 * 4 if name == "gemma3" else 0
    dense = record["kv_dense_bytes"]
    assert record["kv_other_bytes"] == windowed == 2 * record["kv_other_dense_bytes"]
    assert record["held_ratio"] == dense / (900_000 - windowed)
    assert record["model_held_ratio"] == ((dense + windowed / 2) / 900_000 if windowed else None)
    if kind == "elastic":
        report = made.cache.report()
        assert record["model_stored_ratio"] == (report.model_stored_ratio if windowed else None)
