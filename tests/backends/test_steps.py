"""The device step: enqueue, roll back, enqueue again and commit leave what append and decode leave, on every backend."""

import copy
import re
from importlib import import_module
from inspect import signature
from pathlib import Path

import numpy as np
import pytest

import elastickv
from elastickv.errors import UsageError
from elastickv.kvcache import LayerCache
from elastickv.recipe import AttentionShape, Recipe
from tests.helpers.cases import Case
from tests.helpers.kinds import DeviceTensor

SHAPE = AttentionShape(2, 4, 2, 64)
RECIPES = [
    "dense",
    "int8",
    "int4",
    "int8,stride=3",
    "int4,pages=1/2,anchor_every=3,window=32",
    "int8,reuse,anchor_every=4,window=32",
    "int4,rotate=kv,pages=1/2,anchor_every=3,window=32",
    "k=int8_per_channel,v=int4,rotate=v",
]


def case_of(text, dtype="bf16", lengths=(300, 197)):
    return Case(SHAPE, Recipe.parse(text), dtype, lengths)


class Step:
    """One token's tensors on the device, and the results of the step."""

    def __init__(self, cache, case, number, dtype="fp32", channels=64, scale=1.0):
        self.cache, self.scale = cache, scale
        self.token = [array[..., :channels] for array in case.token(number)]
        self.inputs = [DeviceTensor(cache, array, dtype) for array in self.token]
        heads = (SHAPE.batch, SHAPE.query_heads)
        self.outputs = DeviceTensor(cache, np.full((*heads, SHAPE.head_dim), np.nan, np.float32))
        self.lse = DeviceTensor(cache, np.full(heads, np.nan, np.float32))

    def enqueue(self):
        keys, values, queries = (tensor.view for tensor in self.inputs)
        self.cache.enqueue_step(keys, values, queries, self.scale, self.outputs.view, self.lse.view)

    def results(self):
        return self.outputs.array(), self.lse.array()


def appended(cache, case, number):
    keys, values, queries = case.token(number)
    cache.append(keys, values)
    return cache.decode(queries)


def close(results, expected, limit):
    """Outputs and log-sum-exps agree to `limit`, or to the rounding of the float32 that steps write."""
    limit = max(limit, 2.0**-23)
    np.testing.assert_allclose(results[0], expected[0], rtol=0, atol=limit * np.abs(expected[0]).max())
    np.testing.assert_allclose(results[1], expected[1], rtol=2e-6, atol=4 * max(limit, 2e-5))


def same_contents(cache, other):
    assert (cache.step, cache.room) == (other.step, other.room)
    assert cache.lengths.tolist() == other.lengths.tolist()
    last = int(cache.lengths.max())
    for rows, expected in zip(cache.read(0, last), other.read(0, last), strict=True):
        np.testing.assert_array_equal(rows, expected)
    for row, head in np.ndindex(SHAPE.batch, SHAPE.kv_heads):
        pages, expected = cache.pages_read(row, head), other.pages_read(row, head)
        np.testing.assert_array_equal([] if pages is None else pages, [] if expected is None else expected)


@pytest.mark.parametrize("text", RECIPES)
def test_steps_equal_appends_and_decodes_whether_rolled_back_or_not(each, text):
    case = case_of(text)
    (cache, _), (other, _) = each.filled(case, room=70), each.filled(case, room=70)
    for number in range(70):
        cache.prepare_step()
        step = Step(cache, case, number)
        if number % 3 == 0:
            # Another token, which leaves no trace.
            Step(cache, case, 1000 + number).enqueue()
            before = cache.lengths.tolist()
            cache.rollback_step()
            assert (cache.lengths.tolist(), cache.step) == (before, number - 1)
        step.enqueue()
        assert cache.step == number - 1, "nothing is counted before the commit"
        cache.commit_step()
        close(step.results(), appended(other, case, number), each.rounding(case))
        if number % 10 == 9:
            same_contents(cache, other)
    cache.raise_non_finite()


@pytest.mark.parametrize("text", ["dense", "int4", "int8,reuse,anchor_every=4,window=32"])
def test_a_cache_that_was_rolled_back_goes_on_as_if_nothing_had_been_enqueued(each, text):
    case = case_of(text)
    cache, _ = each.filled(case, room=90)
    for number in range(3):
        appended(cache, case, number)
    other = copy.deepcopy(cache)
    cache.prepare_step()
    Step(cache, case, 50).enqueue()
    cache.rollback_step()
    cache.rollback_step()
    same_contents(cache, other)
    chunk = np.random.default_rng(3).standard_normal((2, 2, 2, 40, 64), dtype=np.float32)
    for either in (cache, other):
        either.extend(*chunk, np.array([40, 13]))
    same_contents(cache, other)
    close(appended(cache, case, 60), appended(other, case, 60), each.rounding(case))


def test_a_bad_value_of_a_step_that_was_rolled_back_is_gone(each):
    case = case_of("int4")
    cache, _ = each.filled(case, room=5)
    step = Step(cache, case, 0)
    bad = DeviceTensor(cache, np.full_like(step.token[0], np.nan))
    cache.prepare_step()
    cache.enqueue_step(bad.view, *(tensor.view for tensor in step.inputs[1:]), 1.0, step.outputs.view, step.lse.view)
    cache.rollback_step()
    cache.raise_non_finite()


def test_a_full_cache_is_refused_before_a_step(each):
    case = case_of("int8")
    cache, _ = each.filled(case, room=1)
    assert cache.room == 1
    cache.prepare_step()
    Step(cache, case, 0).enqueue()
    cache.commit_step()
    assert cache.room == 0
    with pytest.raises(UsageError, match="the cache is full: sequence 0 holds 301 of 301 tokens"):
        cache.prepare_step()


@pytest.mark.parametrize("text", ["int4,pages=1/4,anchor_every=2,window=32", "int8,reuse,anchor_every=2,window=32"])
def test_a_step_that_reuses_an_anchor_that_was_not_decoded_is_refused(each, text):
    case = case_of(text)
    cache, _ = each.filled(case, room=10)
    cache.append(*case.token(0)[:2])
    with pytest.raises(RuntimeError, match=r"step 1 reuses the .* of anchor 0, which was not decoded"):
        cache.prepare_step()


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_tensors_of_every_dtype_and_of_fewer_channels_are_stored_and_read_back(each, dtype):
    case, channels = case_of("bf16", dtype), 40
    cache, other = each.new(case, room=9), each.new(case, room=9)
    # As a model's values are: transposed views.
    rows = np.random.default_rng(5).standard_normal((2, 2, 300, 2, channels), dtype=np.float32).transpose(0, 1, 3, 2, 4)
    keys, values = (DeviceTensor(cache, array, dtype) for array in rows)
    cache.prefill(keys.view, values.view, np.array([300, 197]))
    wide = [np.zeros((2, 2, 300, 64), np.float32) for _ in range(2)]
    for target, tensor in zip(wide, rows, strict=True):
        target[..., :channels] = DeviceTensor(other, np.ascontiguousarray(tensor), dtype).array()
    other.prefill(*wide, np.array([300, 197]))
    same_contents(cache, other)
    read = [DeviceTensor(cache, np.full((2, 2, 301, channels), np.nan, np.float32)) for _ in range(2)]
    assert cache.read(0, 301, (read[0].view, read[1].view)) is None
    for tensor, expected in zip(read, other.read(0, 301), strict=True):
        np.testing.assert_array_equal(tensor.array(), expected[..., :channels])
    step = Step(cache, case, 1, dtype, channels, scale=0.5)
    cache.prepare_step()
    step.enqueue()
    cache.commit_step()
    rounded = [DeviceTensor(other, np.ascontiguousarray(array), dtype).array() for array in step.token]
    token_keys, token_values, queries = (np.pad(array, ((0, 0), (0, 0), (0, 24))) for array in rounded)
    other.append(token_keys, token_values)
    close(step.results(), other.decode(queries * np.float32(0.5)), each.rounding(case))
    same_contents(cache, other)


def test_a_launch_key_is_a_caches_own_and_stays(each):
    case = case_of("int8")
    cache, _ = each.filled(case, room=3)
    key = cache.launch_key
    cache.prepare_step()
    Step(cache, case, 0).enqueue()
    cache.commit_step()
    assert cache.launch_key == key
    assert copy.deepcopy(cache).launch_key != key


def tensors(cache, count=9, channels=64, heads=2, dtype="fp32"):
    return DeviceTensor(cache, np.ones((2, heads, count, channels), np.float32), dtype).view


def gaps(cache):
    return DeviceTensor(cache, np.ones((2, 2, 18, 64), np.float32)[:, :, ::2]).view


def narrow_outputs(cache):
    case = case_of("int8")
    step = Step(cache, case, 0)
    keys, values, queries = (tensor.view for tensor in step.inputs)
    narrow = DeviceTensor(cache, np.ones((2, 4, 40), np.float32))
    cache.enqueue_step(keys, values, queries, 1.0, narrow.view, step.lse.view)


NINE = np.array([9, 9])
WRONG = {
    "more channels than a head has": lambda cache: cache.extend(*[tensors(cache, channels=65)] * 2, NINE),
    "an array beside a tensor": lambda cache: cache.extend(np.ones((2, 2, 9, 64), np.float32), tensors(cache), NINE),
    "two dtypes": lambda cache: cache.extend(tensors(cache, dtype="fp16"), tensors(cache), NINE),
    "heads of another model": lambda cache: cache.prefill(*[tensors(cache, heads=1)] * 2, NINE),
    "an out that is too short": lambda cache: cache.read(0, 9, (tensors(cache, 8), tensors(cache, 8))),
    "an out with gaps": lambda cache: cache.read(0, 9, (gaps(cache), gaps(cache))),
    "outputs of fewer channels": lambda cache: narrow_outputs(cache),
}


@pytest.mark.parametrize("call", WRONG)
def test_tensors_that_no_kernel_may_touch_are_refused_and_nothing_changes(each, call):
    cache, queries = each.filled(case_of("int8"), room=10)
    before = cache.decode(queries)
    with pytest.raises(ValueError, match="needed"):
        WRONG[call](cache)
    assert (cache.lengths.tolist(), cache.step) == ([300, 197], -1)
    for got, expected in zip(cache.decode(queries), before, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    "place", ["kvcache.reference.ReferenceCache", "backends.cpu.cache.CpuCache", "backends.cuda.cache.CudaCache"]
)
def test_a_cache_has_every_member_of_the_protocol_with_its_parameters(place):
    module, name = place.rsplit(".", 1)
    kind = getattr(import_module(f"elastickv.{module}"), name)
    members = {name: member for name, member in vars(LayerCache).items() if not name.startswith("_")}
    methods = {name: list(signature(member).parameters) for name, member in members.items() if callable(member)}
    assert {"prefill", "append", "extend", "prepare_step", "enqueue_step", "commit_step", "rollback_step", "crop"} <= set(
        methods
    )
    assert {name: list(signature(getattr(kind, name)).parameters) for name in methods} == methods
    assert {"room", "launch_key", "lengths"} <= set(members) - set(methods)


def test_nothing_above_the_back_ends_names_the_cache_of_one():
    folder = Path(elastickv.__file__).parent
    files = [path for path in folder.rglob("*.py") if path.relative_to(folder).parts[0] not in ("backends", "kvcache")]
    assert len(files) > 100
    named = [
        path.name for path in files if {"CpuCache", "CudaCache"} & set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
    ]
    assert named == []
