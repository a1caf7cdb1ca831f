"""Rotated tensors on every backend: the bits that are stored, the pages that are ranked, and steps of programs."""

import numpy as np
import pytest

from elastickv.backends.feedback import Feedback
from elastickv.errors import NonFiniteError
from elastickv.kvcache import Oracle, ReferenceCache
from elastickv.kvcache.attention import attend
from elastickv.kvcache.error_metrics import relative_l2
from elastickv.recipe import AttentionShape, Recipe
from tests.helpers.cases import Case
from tests.helpers.kinds import DeviceTensor, opened

RECIPES = (
    "int4,rotate=kv",
    "int8,rotate=kv",
    "int8,rotate=k,stride=3",
    "k=int8,v=fp8,rotate=v",
    "k=int8_per_channel,v=int4,rotate=kv",
    "int4,rotate=kv,pages=1/2,anchor_every=3",
)
LENGTHS = (300, 171)


def case_of(text, head_dim=64, dtype="bf16", group=3):
    return Case(AttentionShape(2, 2 * group, 2, head_dim), Recipe.parse(f"{text},window=32"), dtype, LENGTHS, seed=head_dim)


def twin_of(case, room):
    twin = ReferenceCache(case.shape, max(case.lengths) + room, case.dtype, case.recipe)
    twin.prefill(*case.prompt()[:2], np.array(case.lengths))
    return twin


def largest_error(each, case):
    return max(each.limit(case), 1e-3)


@pytest.mark.parametrize("text", RECIPES)
@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(64, "bf16"), (80, "fp16"), (96, "fp32"), (128, "bf16"), (192, "fp16"), (256, "bf16")]
)
def test_rotated_tokens_are_stored_to_the_bit_and_attended_to_as_in_the_reference(each, text, head_dim, dtype):
    if each.name.startswith("cuda") and head_dim not in (64, 80, 128):
        pytest.skip("on a GPU every head size costs a compilation")
    case = case_of(text, head_dim, dtype)
    (cache, queries), twin = each.filled(case, room=70), twin_of(case, 70)
    for step in range(40):
        if step in (0, 3, 39) or case.recipe.anchor_every > 1:
            outputs, lse = each.decode(cache, queries)
            expected, expected_lse = twin.decode(queries)
            assert relative_l2(outputs, expected).max() < largest_error(each, case)
            np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=4 * largest_error(each, case))
            for row, head in np.ndindex(2, 2):
                np.testing.assert_array_equal(cache.pages_read(row, head), twin.pages_read(row, head))
        keys, values, queries = case.token(step)
        for one in (cache, twin):
            one.append(keys, values)
    for row, head in np.ndindex(2, 2):
        ours, theirs = cache.stored(row, head), twin.stored(row, head)
        for name in ("cold_keys", "cold_values", "exact_keys", "exact_values"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize("rotate", ["k", "v", "kv"])
def test_what_is_read_back_and_attended_to_is_in_the_channels_of_the_model(each, rotate):
    """In a window that holds all tokens only the rounding of rotated tokens to 16 bits is left."""
    case = Case(AttentionShape(2, 6, 2, 80), Recipe.parse(f"int4,rotate={rotate},window=512"), "fp32", LENGTHS)
    cache, queries = each.filled(case)
    keys, values, _ = case.prompt()
    outputs, _ = each.decode(cache, queries)
    read = cache.read(0, max(LENGTHS))
    for row, length in enumerate(LENGTHS):
        for rows, expected in zip(read, (keys, values), strict=True):
            assert np.abs(rows[row, :, :length] - expected[row, :, :length]).max() < 2.0**-5
            assert not rows[row, :, length:].any()
        for head in range(2):
            group = slice(3 * head, 3 * head + 3)
            full = attend(queries[row, group], keys[row, head, :length], values[row, head, :length])
            assert relative_l2(outputs[row, group], full.output).max() < 2.0**-6


def test_a_step_of_fewer_channels_than_the_kernel_has_rotates_those_with_zeros(each):
    case = case_of("int4,rotate=kv", 80)
    (cache, _), twin = each.filled(case, room=2), twin_of(case, 2)
    token = [array[..., :72] for array in case.token(1)]
    keys, values, queries = (np.pad(array, [(0, 0), (0, 0), (0, 8)]) for array in token)
    twin.append(keys, values)
    outputs = DeviceTensor(cache, np.full(queries.shape, np.nan, np.float32), "fp16")
    lse = DeviceTensor(cache, np.full(queries.shape[:2], np.nan, np.float32))
    inputs = [DeviceTensor(cache, array, "fp32") for array in token]
    cache.prepare_step()
    cache.enqueue_step(*(tensor.view for tensor in inputs), 1.0, outputs.view, lse.view)
    cache.commit_step()
    assert relative_l2(outputs.array(), twin.decode(queries)[0]).max() < max(largest_error(each, case), 2e-3)


def test_a_value_that_is_not_finite_is_named_where_it_was(each):
    case = case_of("int4,rotate=kv")
    keys, values, _ = case.prompt()
    values[1, 0, 77, 5] = np.inf
    cache = each.new(case)
    cache.prefill(keys, values, np.array(LENGTHS))
    with pytest.raises(NonFiniteError, match="sequence 1, KV head 0, position 77"):
        cache.raise_non_finite()


@pytest.fixture(scope="module", params=["cpu", *(pytest.param(k, marks=pytest.mark.gpu) for k in ("cuda", "cuda simt"))])
def backend(request):
    return opened(request.param, request).backend


def filled(backend, text, layers):
    caches = [backend.cache(AttentionShape(2, 6, 2, 64), 400, "bf16", Recipe.parse(text)) for _ in range(layers)]
    for seed, cache in enumerate(caches):
        cache.fill_random(np.array(LENGTHS), seed)
    return caches


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("text", ["int4,rotate=kv", "int8,rotate=v", "int4,rotate=k,pages=1/2"])
def test_a_program_of_decodes_rotates_in_every_step(backend, text, graph):
    caches = filled(backend, text, 2)
    queries = list(np.random.default_rng(1).standard_normal((2, 2, 6, 64), dtype=np.float32))
    program = backend.attention(caches, queries, 6, graph)
    program.run(3)
    for cache, query, output in zip(caches, queries, program.outputs(), strict=True):
        assert relative_l2(output, Oracle(cache).decode(query)[0]).max() < 4e-3


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("text", ["int4,rotate=kv,window=32", "int8,rotate=v", "int4,rotate=kv,pages=1/2,anchor_every=3"])
def test_a_cycle_is_the_loop_of_append_and_decode(backend, text, graph):
    shape, feedback, rng = AttentionShape(2, 6, 2, 64), Feedback.seeded(64, 5, 1.0, 1.0, 1.0), np.random.default_rng(2)
    tokens, outputs = rng.standard_normal((2, 2, 2, 300, 64), dtype=np.float32), rng.standard_normal((2, 6, 64), np.float32)
    ours = [backend.cache(shape, 340, "bf16", Recipe.parse(text)) for _ in range(2)]
    twins = [ReferenceCache(shape, 340, "bf16", Recipe.parse(text)) for _ in range(2)]
    for cache in (*ours, *twins):
        cache.prefill(*tokens, np.array(LENGTHS))
    program = backend.cycle(ours, outputs, feedback, graph)
    for _ in range(5):
        program.run(1)
        for i, twin in enumerate(twins):
            queries, keys, values = feedback(outputs.astype(np.float32), shape.group)
            twin.append(keys, values)
            outputs = twin.decode(queries)[0]
            assert relative_l2(program.outputs()[i], outputs).max() < 3e-2
        outputs = program.outputs()[-1]
