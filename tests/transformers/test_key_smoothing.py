"""Smoothed keys: attention is that of the model's own keys, and rounding errs less where queries and keys differ by channel."""

import numpy as np
import pytest
import torch

from elastickv.errors import UsageError
from elastickv.recipe import AttentionShape, Recipe
from elastickv.recipe.calibration import StorageStatistics
from elastickv.transformers.key_smoothing import KeySmoothing
from elastickv.transformers.layer_storage import Backends, new_store

CPU = torch.device("cpu")
KV_HEADS, QUERY_HEADS, DIM, TOKENS = 2, 6, 64, 300
SMOOTHING = [[(channel * (head + 3)) % 9 - 4 for channel in range(DIM)] for head in range(KV_HEADS)]
SHAPE = AttentionShape(1, QUERY_HEADS, KV_HEADS, DIM)


@pytest.fixture
def tensors():
    """Keys that are small in the channels where queries are large, as the smoothing assumes."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.tensor(SMOOTHING).float().exp2()
    keys = torch.randn(1, KV_HEADS, TOKENS, DIM, generator=generator) / factors[:, None]
    queries = torch.randn(1, KV_HEADS, QUERY_HEADS // KV_HEADS, DIM, generator=generator) * factors[:, None]
    return keys, torch.randn(keys.shape, generator=generator), queries.flatten(1, 2)


def decoded(recipe, smoothing, tensors):
    keys, values, queries = tensors
    known = StorageStatistics(smoothing)
    store = new_store(Backends(), SHAPE, TOKENS, "fp32", Recipe.parse(recipe), DIM, CPU, statistics=known)
    store.extend(keys[:, :, :-1], values[:, :, :-1], np.array([TOKENS - 1]))
    store.prepare_step()
    outputs, _ = store.enqueue_step(keys[:, :, -1:], values[:, :, -1:], queries, DIM**-0.5)
    store.commit_step()
    return store, outputs


def exact(tensors):
    keys, values, queries = tensors
    return torch.nn.functional.scaled_dot_product_attention(queries[:, :, None], keys, values, enable_gqa=True)[:, :, 0]


def test_attention_is_that_of_the_models_own_keys(tensors):
    store, outputs = decoded("k=int8_per_channel,v=int8,rotate=kv", SMOOTHING, tensors)
    assert (outputs - exact(tensors)).abs().max() < 0.05
    assert (store.read(0, TOKENS)[0] - tensors[0]).abs().max() < 0.05 * tensors[0].abs().max()


def test_rounding_errs_less_than_without(tensors):
    smoothed, plain = (
        (decoded("int4,rotate=k", smoothing, tensors)[1] - exact(tensors)).square().mean() for smoothing in (SMOOTHING, None)
    )
    assert smoothed < plain / 4


def test_a_copy_and_what_is_read_from_it_are_smoothed_too(tensors):
    store, outputs = decoded("int4,rotate=kv", SMOOTHING, tensors)
    copy = store.copy(Backends())
    for a, b in zip(copy.read(0, TOKENS), store.read(0, TOKENS), strict=True):
        assert torch.equal(a, b)
    again = []
    for each in (store, copy):
        each.prepare_step()
        again.append(each.enqueue_step(tensors[0][:, :, :1], tensors[1][:, :, :1], tensors[2], DIM**-0.5)[0])
    assert torch.equal(*again)
    assert not torch.equal(again[0], outputs)


def test_keys_that_are_not_rotated_are_not_smoothed(tensors):
    assert torch.equal(decoded("int4", SMOOTHING, tensors)[1], decoded("int4", None, tensors)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_powers_of_two_change_no_mantissa(tensors, dtype):
    keys, smoothing = tensors[0].to(dtype), KeySmoothing(SMOOTHING, CPU)
    assert torch.equal(smoothing.stored_keys(smoothing.keys(keys)), keys)


def test_a_calibration_without_a_ratio_is_for_recipes_that_rotate_keys():
    from elastickv.transformers.config import _check_calibration

    with pytest.raises(UsageError, match="rotate=k"):
        _check_calibration(None, None, used=False)
