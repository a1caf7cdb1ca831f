"""The smoothing of keys that a calibration chooses, and the file that stores it."""

import json
from dataclasses import replace

import pytest
import torch

from elastickv.errors import UsageError
from elastickv.evaluation.layer_errors import LayerInputs, key_smoothing, layer_errors
from elastickv.recipe import ModelCalibration

TOKENS, DIM, RUN = 512, 64, 16


@pytest.fixture
def inputs():
    """Channel 3 has queries 64 times as large; channel 5 has keys 16 times as large; channel 7 is the same in every key."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(4, RUN, DIM, generator=generator), torch.randn(2, TOKENS, DIM, generator=generator)
    queries[..., 3] *= 64
    keys[..., 5] *= 16
    keys[..., 7] = 1000 + 1e-3 * keys[..., 7]
    return LayerInputs(
        queries=queries, keys=keys, values=torch.randn(2, TOKENS, DIM, generator=generator), projection=torch.eye(4 * DIM),
        residual=torch.ones(RUN), positions=torch.arange(TOKENS - RUN, TOKENS), scaling=DIM**-0.5,
    )  # fmt: skip


def test_channels_that_matter_more_become_larger(inputs):
    for head in key_smoothing(inputs):
        usual = sorted(head)[DIM // 2]
        assert [head[channel] - usual for channel in (3, 5, 7)] == pytest.approx([3, -2, 5], abs=1)


def test_the_size_of_all_queries_or_keys_does_not_matter(inputs):
    larger = replace(inputs, queries=256 * inputs.queries, keys=inputs.keys / 128)
    assert key_smoothing(larger) == key_smoothing(inputs)


def test_rotated_keys_err_less_with_it(inputs):
    keys = inputs.keys.clone()
    keys[..., 7] = 0
    even = replace(inputs, keys=keys)
    plain, smoothed = (layer_errors(even, (1.0,), (1,), RUN, chosen).keys for chosen in (None, key_smoothing(even)))
    assert sum(smoothed["int4+rotated"]) < sum(plain["int4+rotated"]) / 2
    assert smoothed["int4"] == plain["int4"]


@pytest.fixture
def calibration():
    errors = ((0.5, 0.25),)
    return ModelCalibration(
        "model", "0" * 16, (4,), 4, 2, 2, "text", 512, 16, {1: {1.0: errors, 0.5: errors}}, {"int4": errors}, {"int8": errors},
        smoothing=(((1, -2), (0, 3)),),
    )  # fmt: skip


def test_a_file_keeps_it_and_an_older_one_has_none(calibration):
    assert ModelCalibration.loads(calibration.dumps()) == calibration
    assert calibration.smoothing_of(4) == ((1, -2), (0, 3))
    assert calibration.smoothing_of(3) is None
    older = replace(calibration, smoothing=None)
    assert "smoothing" not in json.loads(older.dumps())
    assert ModelCalibration.loads(older.dumps()).smoothing_of(4) is None


@pytest.mark.parametrize(
    ("smoothing", "named"),
    [
        ([[[1, -2]]], "2 KV heads"),
        ([[[1], [2]]], "a number a channel"),
        ([[[1, 2], [3, 99]]], "beyond 12"),
        ([[[1, 1.7], [3, 4]]], "whole number"),
        ([5], "damaged"),
    ],
)
def test_a_damaged_one_is_refused(calibration, smoothing, named):
    text = json.dumps(json.loads(calibration.dumps()) | {"smoothing": smoothing})
    with pytest.raises(UsageError, match=named):
        ModelCalibration.loads(text)
