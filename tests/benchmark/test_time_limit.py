"""A time limit bounds the whole run, and what it leaves out is named in the result and in the table."""

import os
import time

import pytest

from elastickv.benchmark import Options, run, time_budget
from elastickv.benchmark.accuracy import ReplayTimeout, replay
from elastickv.benchmark.contenders import PeerWork, Rotation, peers
from elastickv.benchmark.contenders.torch_timing import checked, inputs
from elastickv.benchmark.sample_inputs import load_sample
from elastickv.benchmark.sequential_decode import run_cycle
from elastickv.benchmark.time_budget import TimeBudget, least_seconds, opening, seconds_text
from elastickv.errors import UsageError
from elastickv.recipe import Recipe
from elastickv.results.formats import FORMATS
from tests.helpers.peers import CPU, FakePeer, contender, peer_work
from tests.helpers.peers import SMALL as SMALL_SHAPE
from tests.helpers.reference_backend import ReferenceBackend, ReferenceProgram, measure_with

SMALL = {"seq": 340, "heads": 2, "dim": 64, "reps": 200, "warmup": 20, "inner_loops": 2, "cache": "hot", "paired": True}


@pytest.fixture
def clock(monkeypatch):
    """A clock that only samples, ceilings and peers advance."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def slow(monkeypatch, clock):
    """The reference backend, each sample of which takes a quarter of a second of the clock, and the ceilings one."""
    measure_with(monkeypatch, ReferenceBackend())
    launch, ceilings = ReferenceProgram.run, ReferenceBackend.ceilings

    def run_slowly(self, launches=1):
        clock[0] += 0.25 * launches
        return launch(self, launches)

    def ceilings_slowly(self):
        clock[0] += 1.0
        return ceilings(self)

    monkeypatch.setattr(ReferenceProgram, "run", run_slowly)
    monkeypatch.setattr(ReferenceBackend, "ceilings", ceilings_slowly)
    return clock


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("limit", [20.0, 40.0])
def test_the_whole_run_ends_with_its_time_limit(slow, limit, inference):
    result = run(Options(**SMALL, compress=1.3, inference=inference, decode_tokens=2, layers=1, time_limit_s=limit))
    taken = slow[0] - 1000.0
    assert 0.8 * limit < taken < 1.1 * limit
    assert result.run_time.total_s == pytest.approx(taken) and result.run_time.limit_s == limit
    assert sum(result.run_time.phases_s.values()) == pytest.approx(taken)
    assert (result.inference_cycle is not None) == inference
    assert result.complete
    assert result.convergence.stopped_by == "time limit"
    assert result.repetitions.requested == 200 and 2 <= result.repetitions.executed < 200
    assert result.repetitions.warmup_requested == 20 and result.repetitions.warmup_executed < 20
    assert f"stopped by the time limit after {result.repetitions.executed} of 200 samples" in FORMATS["table"](result)


def test_a_limit_that_is_too_short_still_gives_a_result_and_names_all_that_is_missing(slow):
    result = run(Options(**SMALL, compress=1.3, inference=True, decode_tokens=2, layers=1, time_limit_s=3.0))
    assert slow[0] - 1000.0 < 12.0
    assert result.repetitions.executed == 2
    assert set(result.baseline.candidates_ms) == {"dense-bf16"}
    assert {"dense-fp32", "dense-fp16"} <= set(result.baseline.not_run)
    assert "not compared: dense-fp32, dense-fp16" in result.baseline.reason
    assert {"warm-up", "ceilings after the samples"} <= set(result.run_time.left_out)
    table = FORMATS["table"](result)
    for name in (*result.run_time.left_out, "dense-fp32 was not measured: it takes about"):
        assert name in table
    assert "s with a time limit of 3 s: " in table
    assert "ceilings after the samples" in FORMATS["csv"](result)


def test_without_a_limit_nothing_is_left_out(slow):
    result = run(Options(**SMALL | {"reps": 6, "warmup": 3}, compress=1.3))
    assert result.run_time.limit_s is None and result.run_time.left_out == {}
    assert (result.repetitions.executed, result.repetitions.warmup_executed) == (6, 3)


def test_the_time_before_the_call_counts(slow):
    late = run(Options(**SMALL, compress=1.3, time_limit_s=20.0), started=1000.0 - 10.0)
    assert late.run_time.total_s == pytest.approx(slow[0] - 990.0)
    assert late.run_time.total_s < 22.0


def test_a_peer_that_does_not_fit_is_not_begun_and_named(slow, monkeypatch):
    began = []

    class Compiling(FakePeer):
        def variants(self, work):
            def compile_(name):
                work.require_time(30.0)
                began.append(name)
                return contender(name, "bf16", 2e-4)()

            return {f"fake-{name}": lambda name=name: compile_(f"fake-{name}") for name in ("one", "two")}

    monkeypatch.setattr(peers, "PEERS", [Compiling()])
    result = run(Options(**SMALL, compress=1.3, peers="all", time_limit_s=60.0))
    assert not began and slow[0] - 1000.0 < 66.0
    for name in ("fake-one", "fake-two"):
        assert "it takes about 30 s, and the time limit of 60 s leaves" in result.baseline.not_run[name]
        assert f"{name} was not measured: it takes about 30 s" in FORMATS["table"](result)
    assert len(run(Options(**SMALL | {"reps": 2}, compress=1.3, peers="all")).contenders) == 4


def test_a_package_is_not_imported_when_the_time_is_over():
    work = PeerWork(CPU, 0, SMALL_SHAPE, 100, Rotation(2, 4, 0.0, False), 0, True, lambda seconds: f"no time for {seconds:g} s")
    peer = FakePeer(good=contender("fake-good", "bf16", 1.0))
    peer.variants = lambda work: pytest.fail("imported")
    assert peers.IMPORT_S > 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "PEERS", [peer])
        assert peers.ready_peers(work) == ([], {"fake": "no time for 5 s"})


def test_a_slow_peer_is_left_out_after_one_step():
    pytest.importorskip("torch")
    limit = {"seconds": 1e9}
    work = peer_work()
    work = PeerWork(
        work.device, 0, work.shape, work.context, work.rotation, 0, True, lambda s: "too slow" if s > limit["seconds"] else None
    )
    data = inputs(work, "fp32")
    steps = []

    def attend(copy):
        steps.append(copy)
        return data.rows[0][0]

    limit["seconds"] = 0.0
    with pytest.raises(UsageError, match="too slow"):
        checked("slow", "1", "fp32", work, data, attend)
    assert steps == [0, 0]


def test_a_replay_that_would_end_late_is_given_up_after_a_few_queries(monkeypatch):
    queries, now = [], [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    class Slow(ReferenceBackend):
        def cache(self, *arguments):
            cache = super().cache(*arguments)
            decode = cache.decode

            def slowly(q):
                queries.append(q)
                now[0] += 0.5
                return decode(q)

            cache.decode = slowly
            return cache

    with pytest.raises(ReplayTimeout, match="it takes about 40 s, and the time limit leaves 39 s"):
        replay(Slow(), load_sample(), Recipe.parse("int8"), "bf16", within_s=39.0)
    assert len(queries) == 5


@pytest.mark.parametrize(("compiling_s", "first_s"), [(0.0, 30.0), (30.0, 0.0), (30.0, 5.0)])
def test_what_a_replay_does_once_is_not_multiplied_by_its_queries(monkeypatch, compiling_s, first_s):
    """The first query loads kernels: a fresh machine was said to take minutes for an error that takes seconds."""
    queries, now, shown = [], [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    class Fresh(ReferenceBackend):
        def cache(self, *arguments):
            now[0] += compiling_s
            cache = super().cache(*arguments)
            decode = cache.decode

            def timed(q):
                now[0] += 0.01 if queries else first_s
                queries.append(q)
                return decode(q)

            cache.decode = timed
            return cache

    sample = load_sample()
    replay(Fresh(), sample, Recipe.parse("int8"), "bf16", 32.0, lambda done, total: shown.append((done, total)))
    assert len(queries) == sample.queries and shown[-1] == (sample.queries, sample.queries)


def test_a_budget_says_how_long_work_takes_and_what_is_left(clock):
    budget = TimeBudget(20.0, started=995.0)
    assert budget.left_s() == 15.0 and budget.left_s(0.5) == 5.0
    assert budget.has_room("this", 5.0, 0.5) and not budget.has_room("that", 6.0, 0.5)
    assert budget.left_out == {"that": "it takes about 6 s, and the time limit of 20 s leaves 5 s for it"}
    assert TimeBudget().has_room("anything", 1e9)


def test_seconds_are_written_without_an_exponent():
    assert [seconds_text(each) for each in (0.0, 0.81, 5.23, 10.4, 130.2, 4000.0)] == ["0", "0.81", "5.2", "10", "130", "4000"]


@pytest.mark.parametrize(("limit", "layers"), [(100.0, 8), (7.0, 5), (0.5, 1)])
def test_a_cycle_takes_as_many_layers_as_end_in_time(clock, monkeypatch, limit, layers):
    """A layer takes half a second to fill, and a round through it one."""
    create = ReferenceBackend.cache

    def create_slowly(self, *args):
        clock[0] += 0.25
        return create(self, *args)

    monkeypatch.setattr(ReferenceBackend, "cache", create_slowly)
    cycle = run_cycle(
        ReferenceBackend(), Recipe.parse("int8"), SMALL_SHAPE, 140, 2, "fp32", "fp32", load_sample(None), layers=8, graph=False,
        seed=0, time_limit_s=limit, progress=lambda *_: None, round_s=8.0, grace_s=1.0,
    )  # fmt: skip
    assert cycle.layers == layers == len(cycle.phases)


def test_the_first_line_says_how_long_a_run_with_a_short_limit_takes_and_why(monkeypatch):
    monkeypatch.setattr(time_budget, "_compiled", lambda: False)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0), raising=False)
    short, long = Options(backend="cpu", time_limit_s=5.0), Options(backend="cpu", time_limit_s=600.0)
    least = sum(least_seconds(short).values())
    assert f"takes about {least:.0f} s at least (checks 4 s, compiling the kernels, once 8 s" in opening(short)
    assert opening(long) == "; the run ends within about 600 s, unless kernels must be compiled first"
    assert opening(Options(backend="cpu")) == ""
    monkeypatch.setattr(os, "getloadavg", lambda: (8.0 * os.cpu_count(), 0.0, 0.0), raising=False)
    assert "other processes make everything about 8.0 times as slow" in opening(short)


def test_larger_work_is_expected_to_take_longer():
    small, large = (Options(backend="cpu", seq=seq, time_limit_s=20.0) for seq in (1024, 65536))
    assert sum(least_seconds(large).values()) > 4 * sum(least_seconds(small).values()) - 3 * (
        time_budget.CHECKS_S + time_budget.COMPILE_S
    )
