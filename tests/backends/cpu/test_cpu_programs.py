"""Programs do what the same steps do one by one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import elastickv
from elastickv.backends import Backend, load
from elastickv.backends.cpu import open_backend
from elastickv.backends.feedback import Feedback
from elastickv.errors import UsageError
from elastickv.kvcache import Oracle
from elastickv.kvcache.error_metrics import relative_l2
from elastickv.recipe import AttentionShape, Recipe

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(elastickv.__file__).parents[1])}
SHAPE = AttentionShape(2, 6, 2, 64)


def filled(
    backend: Backend, text: str, seeds: range, capacity: int = 400, dtype: str = "bf16", staggered: bool = False
) -> list:
    recipe, layers = Recipe.parse(text), len(seeds)
    phases = [recipe.layer_anchor_offset(i, layers) if staggered else 0 for i in range(layers)]
    caches = [backend.cache(SHAPE, capacity, dtype, recipe, anchor_offset) for anchor_offset in phases]
    for cache, seed in zip(caches, seeds, strict=True):
        cache.fill_random(np.array([300, 170]), seed)
    return caches


def test_an_attention_program_decodes_each_cache_with_its_own_queries(backend: Backend, driver: Any) -> None:
    for text in ("dense", "int8", "bf16,stride=3", "k=int8,v=int4", "int4,pages=1/3"):
        caches = filled(backend, text, range(3))
        queries = [driver.queries(cache) for cache in caches]
        program = backend.attention(caches, queries, steps=7, graph=True)
        assert np.isnan(program.outputs()).all()
        times = program.run(4)
        assert len(times) == 4
        assert min(times) > 0
        for cache, query, output in zip(caches, queries, program.outputs(), strict=True):
            assert np.array_equal(output, cache.decode(query)[0])


def test_a_program_scores_the_pages_of_caches_at_an_anchor_and_reuses_the_lists_of_the_others(
    backend: Backend, driver: Any
) -> None:
    caches = filled(backend, "int4,pages=1/2,anchor_every=3", range(3))
    queries = [driver.queries(cache) for cache in caches]
    for steps_since_refresh, cache in enumerate(caches):
        for _ in range(steps_since_refresh + 1):
            driver.append(cache)
            cache.decode(driver.queries(cache))
    before = [cache.pages_read(0, 0) for cache in caches]
    program = backend.attention(caches, queries, steps=6, graph=False)
    program.run(2)
    for steps_since_refresh, (cache, query, output) in enumerate(zip(caches, queries, program.outputs(), strict=True)):
        assert steps_since_refresh == 0 or np.array_equal(cache.pages_read(0, 0), before[steps_since_refresh])
        assert relative_l2(output, Oracle(cache).decode(query)[0]).max() < 4e-3
    assert not np.array_equal(caches[0].pages_read(0, 0), before[0])


def test_a_program_of_fewer_steps_than_caches_leaves_the_rest_poisoned(backend: Backend, driver: Any) -> None:
    caches = filled(backend, "dense", range(3))
    program = backend.attention(caches, [driver.queries(cache) for cache in caches], steps=2, graph=False)
    program.run()
    finite = [bool(np.isfinite(output).all()) for output in program.outputs()]
    assert finite == [True, True, False]


def test_a_program_tells_that_it_is_no_graph(backend: Backend, driver: Any) -> None:
    cache = filled(backend, "dense", range(1))[0]
    program = backend.attention([cache], [driver.queries(cache)], steps=1, graph=True)
    assert (program.captured, program.nodes, program.kernels_per_step) == (False, None, 1)


@pytest.mark.parametrize(
    "text",
    [
        "dense",
        "int8,window=32",
        "bf16,stride=2",
        "bf16,reuse,anchor_every=3,decay=0.95,window=0",
        "fp8",
        "k=int8,v=int4,window=32",
        "int4,pages=1/2",
        "int4,pages=1/3:1/2,anchor_every=5,window=0",
    ],
)
def test_a_cycle_equals_the_same_steps_in_numpy(text: str, backend: Backend, driver: Any) -> None:
    caches = filled(backend, text, range(3), dtype="fp32", staggered=True)
    feedback = Feedback.seeded(SHAPE.head_dim, seed=4, query_rms=1.5, key_rms=1.1, value_rms=0.7)
    fed = driver.queries(caches[0])
    program = backend.cycle(caches, fed, feedback, graph=True)
    twins = filled(backend, text, range(3), dtype="fp32", staggered=True)
    assert len({cache.anchor_offset for cache in caches}) == min(3, caches[0].recipe.anchor_every)
    oracles = [Oracle(twin) for twin in twins]
    for _ in range(40):
        program.run()
        # The recurrence is chaotic: the twin is fed what the program computed, so that every step is held to one step's error.
        for output, twin, oracle in zip(program.outputs(), twins, oracles, strict=True):
            queries, keys, values = feedback(fed, SHAPE.group)
            twin.append(keys, values)
            twin.decode(queries)
            assert relative_l2(output, oracle.decode(queries)[0]).max() < (1e-5 if text == "dense" else 4e-3)
            fed = output
    for cache, twin in zip(caches, twins, strict=True):
        assert np.array_equal(cache.lengths, twin.lengths)
        assert cache.step == twin.step == 39
    program.reset()
    assert [cache.step for cache in caches] == [-1, -1, -1]


@pytest.mark.parametrize("text", ["int8,reuse,anchor_every=4,window=32", "int4,pages=1/2,anchor_every=7,window=32"])
def test_a_reset_cycle_repeats_itself_bit_for_bit(text: str, backend: Backend, driver: Any) -> None:
    caches = filled(backend, text, range(2), staggered=True)
    program = backend.cycle(caches, driver.queries(caches[0]), Feedback.seeded(64, 1, 1.0, 1.0, 1.0), graph=False)
    program.run(50)
    first = program.outputs()
    program.reset()
    program.run(20)
    program.run(30)
    assert np.array_equal(first, program.outputs())


def test_a_cycle_that_would_outgrow_its_caches_is_refused_before_it_starts(backend: Backend, driver: Any) -> None:
    caches = filled(backend, "dense", range(2), capacity=310)
    program = backend.cycle(caches, driver.queries(caches[0]), Feedback.seeded(64, 1, 1.0, 1.0, 1.0), graph=False)
    with pytest.raises(UsageError, match="the cache is full"):
        program.run(11)
    assert np.array_equal(caches[0].lengths, [300, 170])
    program.run(10)
    assert np.array_equal(caches[0].lengths, [310, 180])


def test_the_host_is_described_and_its_limits_are_numbers(backend: Backend) -> None:
    device = backend.device
    assert device.kind == "cpu"
    assert device.name
    assert device.compute_units >= 1
    assert 0 < device.free_bytes <= device.memory_bytes
    assert device.last_level_cache_bytes >= 1 << 18
    for _ in range(2):
        limits = backend.ceilings()
        assert min(limits.read_gbs, limits.copy_gbs, limits.flops) > 0


@pytest.mark.parametrize("thread", [0, 1, 7])
def test_multiply_adds_stay_far_from_denormals_on_every_thread(backend: Backend, thread: int) -> None:
    """Sums that fade cost a hundred times as much on some processors."""
    from numba import njit

    from elastickv.backends.cpu import ceilings
    from elastickv.backends.cpu.ceilings import multiply_add_stream

    total = njit(lambda seed, turns: multiply_add_stream(seed, turns))(thread, ceilings.MULTIPLY_TURNS)
    assert total == pytest.approx(16 * 16 * 1000 * (thread + 1), rel=1e-3)


def test_after_the_first_time_only_the_fastest_ways_are_read_in(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    from elastickv.backends.cpu import ceilings

    ways_read, limits = [], ceilings.Limits()
    seconds = {way: 1.0 + abs(way - 4096) for way in ceilings.READ_WAYS}
    monkeypatch.setattr(
        ceilings, "_measured", lambda device, ways: ways_read.append(ways) or (None, {w: seconds[w] for w in ways})
    )
    for _ in range(3):
        limits.measure(None)
    assert ways_read == [ceilings.READ_WAYS, (4096, 512), (4096, 512)]


def test_only_device_0_exists() -> None:
    assert open_backend(0).name == "cpu"
    with pytest.raises(UsageError, match="one device, 0"):
        open_backend(1)
    assert load("cpu")[0].name == "cpu"


def test_numba_is_imported_only_when_the_back_end_is_opened() -> None:
    code = "import sys, elastickv.backends; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=False).returncode == 0


PLAIN_PROCESSOR = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}


@pytest.mark.parametrize("variables", [{"NUMBA_NUM_THREADS": "1"}, {"NUMBA_NUM_THREADS": "3"}, PLAIN_PROCESSOR], ids=str)
def test_any_number_of_threads_and_any_processor_give_correct_results(variables: dict[str, str]) -> None:
    code = """
import numpy as np
from elastickv.backends import load
from elastickv.kvcache import Oracle
from elastickv.recipe import AttentionShape, Recipe
backend, _ = load("cpu")
for dtype, recipe in (("fp32", "dense"), ("fp16", "dense"), ("bf16", "dense"), ("bf16", "int8"), ("bf16", "int4"),
                      ("bf16", "fp8"), ("bf16", "int4,pages=1/2")):
    cache = backend.cache(AttentionShape(1, 10, 2, 64), 3000, dtype, Recipe.parse(recipe))
    cache.fill_random(np.array([3000]), 1)
    queries = np.random.default_rng(0).standard_normal((1, 10, 64), dtype=np.float32)
    program = backend.attention([cache], [queries], 20, False)
    program.run(5)
    expected = Oracle(cache).decode(queries)[0]
    assert np.allclose(program.outputs()[0], expected, atol=1e-6 if recipe in ("dense", "fp8") else 2e-4)
"""
    environment = ENVIRONMENT | variables
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
