"""The study of formats: what a variant stores, what its encoder gains, and what the script writes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.tiny_models import tiny_gguf

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import format_study
import torch
from format_study_codecs import Statistics, Variant, quantized

from elastickv.errors import UsageError
from elastickv.kvcache.quantize import dequantize_channels, quantize_int4_keys

DIM = 16


@pytest.fixture
def rows():
    channels = torch.linspace(0.1, 3, DIM)
    return torch.randn(2, 1, 3, 128, DIM, generator=torch.Generator().manual_seed(0)) * channels + channels


@pytest.fixture
def statistics(rows):
    mixing = torch.randn(2, 1, 3, DIM, DIM, generator=torch.Generator().manual_seed(1))
    return Statistics((rows.mT @ rows).mean(1, keepdim=True) / 128, mixing @ mixing.mT)


@pytest.mark.parametrize(
    ("name", "head_dim", "bits"),
    [
        ("k4/32", 64, 4 + (16 + 16) / 32),
        ("k4/64 hadamard hessian log8", 64, 4 + (8 + 16) / 64),
        ("v3 hadamard log8 zero8", 128, 3 + (8 + 8) / 128),
        ("v8 symmetric", 64, 8 + 16 / 64),
    ],
)
def test_bits_count_the_scale_and_the_zero(name, head_dim, bits):
    assert Variant.parse(name).stored_bits(head_dim) == bits


def test_plain_keys_are_those_of_int4_pages(rows, statistics):
    pages = rows.unflatten(-2, (-1, 32)).numpy()
    ours = dequantize_channels(*quantize_int4_keys(pages)).reshape(rows.shape)
    assert np.allclose(quantized(Variant.parse("k4/32"), rows, statistics).numpy(), ours, rtol=2**-11, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["k4/32", "k3/64 hadamard log8", "k4/128 balanced", "v4", "v4 smooth", "v3 hadamard log8 zero8"]
)
def test_rounding_with_the_hessian_lowers_the_weighted_error(name, rows, statistics):
    def loss(name):
        error = quantized(Variant.parse(name), rows, statistics) - rows
        return float((error @ statistics.hessian * error).sum())

    assert 0 < loss(f"{name} hessian") < 0.8 * loss(name)


@pytest.mark.parametrize("name", ["k8/32", "k8/64 balanced", "v8 smooth", "v8 hadamard log8 zero8", "v8 symmetric"])
def test_eight_bits_restore_rows_in_every_transform(name, rows, statistics):
    restored = quantized(Variant.parse(name), rows[..., :100, :], statistics)
    assert torch.allclose(restored, rows[..., :100, :], atol=0.15) and restored.shape[-2] == 100


@pytest.mark.parametrize("name", ["", "k4", "v4/32", "k9/32", "k4/16", "k4/32 rotated", "k4/32 zero8", "v4 hadamard smooth"])
def test_a_name_of_no_variant_is_refused(name):
    with pytest.raises(UsageError, match="is unknown: give k2 to k8"):
        Variant.parse(name)


def test_a_mix_is_cheapest_within_its_bits():
    losses = {"k4/64": [1.0, 9.0], "k8/64": [0.0, 0.0], "v4": [2.0, 1.0], "v8": [0.0, 0.0]}
    bits = {"k4/64": 4.0, "k8/64": 8.0, "v4": 4.0, "v8": 8.0}
    assert format_study.cheapest(losses, bits, 5.0) == {"k": ["k4/64", "k8/64"], "v": ["v4", "v4"]}
    assert format_study.cheapest(losses, bits, 6.0) == {"k": ["k4/64", "k8/64"], "v": ["v8", "v4"]}
    assert format_study.cheapest(losses, bits, 8.0) == {"k": ["k8/64", "k8/64"], "v": ["v8", "v8"]}


@pytest.fixture
def call(tmp_path, monkeypatch):
    model = tiny_gguf(tmp_path / "Tiny-Model.Q4_0.gguf")
    settings = [str(model), "--tokens=320", "--scored=9", "--windows=2", "--calibration-windows=1"]
    output = tmp_path / "study.json"

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["format_study.py", *settings, f"--output={output}", *arguments])
        return format_study.main(), json.loads(output.read_text()) if output.exists() else None

    return run


def test_variants_and_mixes_are_written_and_printed(call, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(format_study, "MIXED", ("k4/64 hessian", "k8/64", "v4 balanced", "v8 symmetric"))
    monkeypatch.setattr(format_study, "CHOICES", (("k4/32", "k4/32 hadamard"),))
    monkeypatch.setattr(format_study, "BUDGETS", (6.0,))
    named = ["k8/64", "k2/64 + v2"]
    status, record = call(*(f"--variant={name}" for name in named), "--mixes")
    assert status == 0 and record["complete"] and str(tmp_path) not in json.dumps(record)
    assert [row["name"] for row in record["rows"][:2]] == named and len(record["rows"]) == 5
    fine, coarse, chosen, mix, _ = record["rows"]
    assert 0 <= fine["kl"] < coarse["kl"] and fine["v_bits"] is None and fine["bits"] == fine["k_bits"] == 8.5
    assert {*chosen["layers"]["k"]} <= {"k4/32", "k4/32 hadamard"} and chosen["layers"]["v"] == ["v4 hadamard hessian"] * 2
    assert mix["bits"] <= 6 and len(mix["kl_of_windows"]) == 2
    table = capsys.readouterr().out.partition("By bits")[2]
    assert [table.index(f"  {name}\n") for name in reversed(named)] == sorted(table.index(f"  {name}\n") for name in named)


def test_the_rows_before_the_time_is_over_stay(call):
    status, record = call("--variant=k8/64", "--time-limit=0")
    assert status == 1 and record is None


@pytest.mark.parametrize("argument", ["--variant=k9/32", "--variant=v4 + k4/32", "--scored=200", "--windows=0"])
def test_what_cannot_be_measured_is_refused(call, argument, capsys):
    status, record = call(argument)
    assert status == 2 and record is None and capsys.readouterr().err.startswith("error: ")
