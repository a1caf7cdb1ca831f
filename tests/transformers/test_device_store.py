"""A store on a GPU compared with its float64 twin, for several dtypes, strides and head sizes; torch owns the memory."""

import gc

import numpy as np
import pytest
import torch

from elastickv.kvcache import Oracle, ReferenceCache
from elastickv.recipe import AttentionShape, Recipe
from elastickv.transformers.layer_storage import Backends, new_store

pytestmark = pytest.mark.gpu
LIMITS = {"fp32": 1e-4, "fp16": 4e-3, "bf16": 4e-3}
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@pytest.fixture(scope="module")
def device(open_cuda):
    open_cuda()
    return torch.device("cuda", 0)


def tensors(device, dtype, batch, heads, tokens, head_dim, seed):
    """Return keys with a model's strides, and values with those of a transposed view."""
    generator = torch.Generator(device).manual_seed(seed)
    keys = torch.randn(batch, heads, tokens, head_dim, generator=generator, device=device).to(dtype)
    values = torch.randn(batch, tokens, heads, head_dim, generator=generator, device=device).to(dtype).transpose(1, 2)
    return keys, values


def take_step(store, keys, values, queries, scaling):
    store.prepare_step()
    outputs = store.enqueue_step(keys, values, queries, scaling)
    store.commit_step()
    return outputs


def arrays(keys, values, wide):
    return [np.pad(t.float().cpu().numpy(), ((0, 0), (0, 0), (0, 0), (0, wide - t.shape[3]))) for t in (keys, values)]


@pytest.mark.parametrize(
    "text",
    [
        "dense",
        "int8",
        "int4",
        "fp8",
        "int4,pages=1/4,anchor_every=3",
        "k=int8,v=int4",
        "k=int8_per_channel,v=int8",
        "int4,rotate=kv",
    ],
)
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.bfloat16, 64), (torch.float16, 72), (torch.float32, 128)])
def test_chunks_and_steps_match_the_float64_twin(device, text, dtype, head_dim):
    wide = {64: 64, 72: 80, 128: 128}[head_dim]
    shape, recipe = AttentionShape(2, 8, 2, wide), Recipe.parse(text)
    store = new_store(Backends(), shape, 400, NAMES[dtype], recipe, head_dim, device)
    twin = ReferenceCache(shape, 700, NAMES[dtype], recipe)
    for seed, (tokens, lengths) in enumerate(((300, [300, 187]), (33, [1, 33]), (90, [90, 0]))):
        inputs = tensors(device, dtype, 2, 2, tokens, head_dim, seed)
        store.extend(*inputs, np.array(lengths))
        twin.extend(*arrays(*inputs, wide), np.array(lengths))
    for stored, expected in zip(store.read(0, 400), twin.read(0, 400), strict=True):
        np.testing.assert_allclose(stored.cpu().numpy(), expected[..., :head_dim], rtol=1e-6, atol=0)
    scaling = 0.3 / head_dim**0.5
    for step in range(40):
        keys, values = tensors(device, dtype, 2, 2, 1, head_dim, 10 + step)
        queries = torch.randn(2, 8, 1, head_dim, device=device).to(dtype)[:, :, 0]
        outputs, lse = take_step(store, keys, values, queries, scaling)
        k, v = arrays(keys, values, wide)
        twin.append(k[:, :, 0], v[:, :, 0])
        scaled_queries = np.pad(queries.float().cpu().numpy(), ((0, 0), (0, 0), (0, wide - head_dim))) * scaling * wide**0.5
        expected, expected_lse = Oracle(store.cache).decode(scaled_queries)
        error = np.linalg.norm(outputs.float().cpu().numpy() - expected[..., :head_dim]) / np.linalg.norm(expected)
        assert error < LIMITS[recipe.exact_dtype(NAMES[dtype])], step
        np.testing.assert_allclose(lse.cpu().numpy(), expected_lse, atol=0.02, rtol=0)
    assert store.lengths.tolist() == twin.lengths.tolist() == [431, 260]
    for stored, expected in zip(store.read(0, 431), twin.read(0, 431), strict=True):
        np.testing.assert_allclose(stored.cpu().numpy(), expected[..., :head_dim], rtol=1e-6, atol=0)


def test_rows_are_picked_copied_and_cropped(device):
    shape = AttentionShape(2, 4, 2, 64)
    store = new_store(Backends(), shape, 500, "bf16", Recipe.parse("int4,pages=1/2"), 64, device)
    store.extend(*tensors(device, torch.bfloat16, 2, 2, 300, 64, 0), np.array([300, 187]))
    before = store.read(0, 300)
    other = store.copy(Backends())
    store.gather(np.array([1, 1, 0]))
    assert store.lengths.tolist() == [187, 187, 300]
    for now, was in zip(store.read(0, 300), before, strict=True):
        assert torch.equal(now, was[[1, 1, 0]])
    key = store.launch_key
    store.gather(np.array([2, 0, 1]))
    assert store.launch_key == key, "rows move in place"
    assert store.lengths.tolist() == [300, 187, 187]
    other.cache.crop(np.array([170, 187]))
    for now, was in zip(other.read(0, 170), before, strict=True):
        torch.testing.assert_close(now, was[:, :, :170], rtol=2**-8, atol=0)


def test_memory_is_pytorchs_and_is_released(device):
    gc.collect()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated(device)
    backends, shape = Backends(), AttentionShape(1, 32, 8, 128)
    recipe = Recipe.parse("int4,pages=1/2")
    store = new_store(backends, shape, 32768, "bf16", recipe, 128, device)
    taken = torch.cuda.memory_allocated(device) - held
    assert taken <= store.cache.allocated_bytes * 1.01 + (1 << 20)
    assert store.cache.allocated_bytes < 2 * 2 * 8 * 128 * 32768 / 2.9, "no dense copy"
    del store, backends
    gc.collect()
    assert torch.cuda.memory_allocated(device) == held


def test_steps_run_on_a_side_stream(device):
    shape, stream = AttentionShape(1, 4, 2, 64), torch.cuda.Stream(device)
    by_stream = []
    for side in (False, True):
        store = new_store(Backends(), shape, 500, "bf16", Recipe.parse("int4"), 64, device)
        inputs = tensors(device, torch.bfloat16, 1, 2, 300, 64, 0)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream if side else torch.cuda.current_stream()):
            store.extend(*inputs, np.array([300]))
            keys, values = tensors(device, torch.bfloat16, 1, 2, 1, 64, 1)
            outputs, _ = take_step(store, keys, values, keys.repeat(1, 2, 1, 1)[:, :, 0], 0.125)
            by_stream.append(outputs.clone())
        torch.cuda.synchronize()
    assert torch.equal(*by_stream)
