"""Every backend on the shipped activations: the kernels compute what the float64 reference does, recipe by recipe."""

from functools import cache

import pytest

from elastickv.backends import load
from elastickv.benchmark.accuracy import replay, sample_shape
from elastickv.benchmark.sample_inputs import load_sample
from elastickv.errors import UsageError
from elastickv.recipe import Recipe

RECIPES = (
    "dense",
    "int8",
    "bf16,stride=3",
    "int8,stride=4",
    "bf16,reuse,anchor_every=4,decay=0.95,sinks=0,window=0",
    "int4",
    "int4,vgroup=32",
    "fp8",
    "k=int8,v=int4",
    "k=int4,v=bf16",
    "k=int8_per_channel,v=int8",
    "int4,pages=1/4",
    "int4,pages=1/2,anchor_every=4,window=0",
)


# A third of the sample is quicker and still has dozens of pages.
SAMPLE = load_sample().at(1536)


@cache
def accuracy_of(backend, text, dtype="bf16"):
    return replay(backend, SAMPLE, Recipe.parse(text), dtype)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request):
    try:
        return load(request.param)[0]
    except UsageError as reason:
        if request.param == "cpu":
            raise
        pytest.skip(str(reason))


@pytest.mark.parametrize("text", RECIPES)
def test_the_kernel_error_on_real_activations_is_within_its_limit(backend, text):
    # `replay` raises KernelMismatch beyond the limit; what is asserted here is that something was compared.
    accuracy = accuracy_of(backend, text)
    shape = sample_shape(SAMPLE)
    assert accuracy.kernel_error.count == SAMPLE.queries * shape.batch * shape.query_heads
    assert accuracy.kernel_error.max < 4e-2
    assert accuracy.recipe_error.mean >= accuracy.kernel_error.mean / 2


@pytest.mark.parametrize(("dtype", "limit"), [("fp32", 1e-5), ("fp16", 4e-3)])
def test_dense_is_exact_on_real_activations(backend, dtype, limit):
    accuracy = accuracy_of(backend, "dense", dtype)
    assert accuracy.kernel_error.p95 < limit
    # Against unquantised keys and values: fp32 loses nothing, fp16 what rounding them costs.
    assert accuracy.recipe_error.p95 < 5 * limit


def test_recipes_rank_on_real_activations_as_the_solver_assumes(backend):
    errors = [accuracy_of(backend, text).recipe_error.mean for text in RECIPES[:4]]
    assert errors == sorted(errors)
