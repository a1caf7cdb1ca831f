"""The dense baseline: a tie goes to the model's own dtype, a clear difference does not, and both are said."""

import re
from dataclasses import replace

import numpy as np
import pytest

from elastickv.benchmark import Options, prepare, run
from elastickv.benchmark.contenders import Contender, Rotation
from elastickv.benchmark.contenders.dense_choice import MOST_PAIRS, dtypes_to_try, in_turns, is_faster
from elastickv.results.formats import FORMATS
from tests.helpers.reference_backend import measure_as_timed

SMALL = {"seq": 340, "heads": 2, "dim": 64, "reps": 12, "warmup": 1, "inner_loops": 2, "cache": "hot", "paired": True}


def noisy(name, milliseconds, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    rotation = Rotation(1, 1, 1.0, False)

    def sample():
        return milliseconds * float(np.exp(noise * rng.standard_normal()))

    return Contender(name, "dense", "1", name[-4:], 1.0, rotation, sample, False, None, None)


def test_equal_dtypes_on_a_noisy_machine_never_change_places():
    chosen = []
    for seed in range(20):
        comparison, _, _ = in_turns(noisy("dense-bf16", 1.0, 0.3, seed), noisy("dense-fp16", 1.0, 0.3, 1000 + seed), seed)
        chosen.append(is_faster(comparison))
    assert not any(chosen)


@pytest.mark.parametrize("seed", range(5))
def test_a_faster_dtype_is_found_through_noise_by_more_pairs(seed):
    comparison, slow, fast = in_turns(noisy("dense-bf16", 1.1, 0.3, seed), noisy("dense-fp32", 1.0, 0.3, 1000 + seed), seed)
    assert is_faster(comparison)
    assert 16 < comparison.speed.samples <= MOST_PAIRS
    assert slow > fast


def test_a_difference_of_less_than_a_tie_changes_nothing_however_certain():
    comparison, _, _ = in_turns(noisy("dense-bf16", 1.01), noisy("dense-fp16", 1.0))
    assert comparison.speed.low > 1 and not is_faster(comparison)


def test_a_clear_difference_takes_few_pairs():
    assert in_turns(noisy("dense-bf16", 1.0), noisy("dense-fp32", 2.0))[0].speed.samples == 4


def test_the_models_own_dtype_comes_first():
    assert dtypes_to_try("fp16", None) == ("fp16", "fp32", "bf16")
    assert dtypes_to_try("fp16", "fp32") == ("fp32",)


@pytest.fixture
def times(monkeypatch):
    return measure_as_timed(monkeypatch)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_of_equally_fast_dtypes_the_models_own_is_the_baseline_and_the_result_says_why(times, dtype):
    result = run(Options(**SMALL, compress=1.3, dtype=dtype))
    assert result.baseline.name == f"dense-{dtype}" and result.baseline.dtype == dtype
    assert result.baseline.reason.startswith("the model's own dtype; no other is faster")
    assert len(result.baseline.compared) == 2
    for shown in ("table", "html"):
        assert f"baseline dense-{dtype}: the model" in FORMATS[shown](result)


@pytest.mark.parametrize(("elastic", "dense_bf16", "falls_back"), [(2.0, 1.5, True), (1.505, 1.5, False), (1.2, 1.5, False)])
def test_where_fp32_is_the_fastest_a_fallback_is_the_dense_16_bit_cache_and_only_if_that_is_faster(
    times, elastic, dense_bf16, falls_back
):
    times.update(elastic=elastic, bf16=dense_bf16, fp16=1.6, fp32=1.0)
    result = run(Options(**SMALL, compress=1.3))
    assert result.baseline.name == "dense-fp32"
    assert "faster than dense-bf16 by more than 2 %" in result.baseline.reason
    assert bool(result.fallback) == falls_back
    assert result.recipe.ratio_read >= 1
    if falls_back:
        assert result.recipe.ratio_read == 1
        assert "dense-bf16" in result.fallback


def test_a_requested_fp32_baseline_does_not_make_the_fallback_read_fp32(times):
    times.update(elastic=2.0)
    result = run(Options(**SMALL, compress=1.3, dense="fp32"))
    assert result.fallback and result.recipe.ratio_read == 1
    assert result.baseline.name == "dense-fp32" and "only dtype that was requested" in result.baseline.reason


def test_a_fallback_and_its_budget_are_in_every_format(times):
    times.update(elastic=2.0)
    result = run(Options(**SMALL, compress=1.3))
    assert "FALLBACK, budget 1/1.3 not met" in FORMATS["table"](result)
    for shown in FORMATS:
        assert "auto fell back to dense-bf16" in re.sub(r"\s+", " ", FORMATS[shown](result)), shown
    assert any("the budget is not met: dense reads 1/1.00 of the dense 16-bit bytes" in line for line in result.warnings)


def test_a_difference_that_is_noise_is_no_reason_to_fall_back(times, monkeypatch):
    rng = np.random.default_rng(0)
    real = prepare.in_turns

    def shaken(reference, other, *args):
        def noise(contender):
            return replace(contender, sample=lambda: contender.sample() * float(np.exp(0.1 * rng.standard_normal())))

        return real(noise(reference), noise(other), *args)

    monkeypatch.setattr(prepare, "in_turns", shaken)
    times.update(elastic=1.002)
    assert [run(Options(**SMALL, compress=1.3, seed=seed)).fallback for seed in range(3)] == [None] * 3
