"""The order of measurement, exact counts, and what stops a run."""

from collections import Counter

import pytest

from elastickv.benchmark import sampler
from elastickv.benchmark.sampler import collect, schedule


@pytest.mark.parametrize("reps", [2, 3, 7, 20])
@pytest.mark.parametrize("paired", [True, False])
def test_every_contender_is_measured_exactly_reps_times(reps, paired):
    assert Counter(schedule(["a", "b", "c"], reps, paired, 0)) == {"a": reps, "b": reps, "c": reps}


def test_paired_blocks_are_mirrored_so_that_a_linear_drift_cancels():
    order = list(schedule(["a", "b", "c"], 100, True, 0))
    for start in range(0, 300, 6):
        block = order[start : start + 6]
        assert block == block[::-1]
    firsts = Counter(order[::6])
    assert set(firsts) == {"a", "b", "c"}


def test_the_seed_decides_the_order():
    names = ["a", "b"]
    assert list(schedule(names, 40, True, 1)) == list(schedule(names, 40, True, 1))
    assert list(schedule(names, 40, True, 1)) != list(schedule(names, 40, True, 2))


def test_unpaired_runs_take_one_contender_after_the_other():
    assert list(schedule(["a", "b"], 3, False, 0)) == ["a"] * 3 + ["b"] * 3


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(sampler.time, "monotonic", lambda: now[0])
    return now


def ticking(clock, seconds):
    def sample():
        clock[0] += seconds
        return seconds

    return sample


@pytest.mark.parametrize("paired", [True, False])
def test_the_time_limit_stops_and_says_so(clock, paired):
    samples = collect({"a": ticking(clock, 1), "b": ticking(clock, 1)}, 1000, paired=paired, time_limit_s=20)
    assert samples.stopped_by == "time limit"
    assert samples.complete
    assert 18 <= clock[0] <= 26
    assert abs(len(samples.times["a"]) - len(samples.times["b"])) <= 1


def test_without_a_limit_reps_is_exact(clock):
    samples = collect({"a": ticking(clock, 1), "b": ticking(clock, 1)}, 11, paired=True)
    assert samples.stopped_by == "reps"
    assert samples.rounds == 11


def test_convergence_stops(clock):
    samples = collect({"a": ticking(clock, 1)}, 100, paired=True, converged=lambda s: s.rounds >= 10)
    assert samples.stopped_by == "interval"
    assert samples.rounds == 10


def test_ctrl_c_keeps_whole_rounds_and_marks_them_incomplete():
    taken = []

    def sample():
        if len(taken) == 9:
            raise KeyboardInterrupt
        taken.append(1)
        return 1.0

    samples = collect({"a": sample, "b": sample}, 100, paired=True)
    assert not samples.complete
    assert samples.stopped_by == "interrupt"
    assert len(samples.times["a"]) == len(samples.times["b"]) == 4


def test_a_disturbed_sample_is_kept_and_marked():
    states = iter([False, True, False, False, False, True])
    samples = collect({"a": lambda: 1.0}, 6, paired=True, disturbed=lambda: next(states))
    assert samples.times["a"] == [1.0] * 6
    assert samples.flagged == {"a": [1, 5]}


@pytest.mark.parametrize("paired", [True, False])
def test_the_order_and_the_progress_are_told(paired):
    told = []
    samples = collect({"a": lambda: 1.0, "b": lambda: 2.0}, 41, paired=paired, progress=lambda *now: told.append(now))
    assert samples.order == list(schedule(["a", "b"], 41, paired, 0))
    assert told == [(done, 82) for done in range(1, 83)]
    assert samples.times == {"a": [1.0] * 41, "b": [2.0] * 41}
    assert samples.flagged == {}


@pytest.mark.parametrize(("limit", "rounds"), [(3, 2), (4, 2), (5, 2), (8, 4), (11, 4)])
def test_a_paired_run_stops_before_a_block_that_would_end_after_its_time(clock, limit, rounds):
    clock[0] = 1000.0
    contenders = {"a": ticking(clock, 1), "b": ticking(clock, 1)}
    asked = []
    samples = collect(contenders, 100, paired=True, time_limit_s=limit, converged=lambda s: bool(asked.append(s.rounds)))
    assert samples.rounds == rounds
    assert asked == list(range(2, rounds, 2))


@pytest.mark.parametrize(("limit", "taken"), [(0, [2, 2]), (10, [6, 5]), (None, [20, 20])])
def test_an_unpaired_run_shares_its_time_out_and_takes_two_samples_at_least(clock, limit, taken):
    clock[0] = 1000.0
    samples = collect({"a": ticking(clock, 1), "b": ticking(clock, 1)}, 20, paired=False, time_limit_s=limit)
    assert [len(samples.times[name]) for name in "ab"] == taken
    assert samples.stopped_by == ("reps" if limit is None else "time limit")


def test_the_mark_of_a_sample_that_is_cut_off_goes_with_it():
    taken = []

    def sample():
        if len(taken) == 5:
            raise KeyboardInterrupt
        taken.append(1)
        return 1.0

    samples = collect({"a": sample, "b": sample}, 100, paired=True, disturbed=lambda: True)
    assert samples.rounds == 2
    assert samples.flagged == {"a": [0, 1], "b": [0, 1]}
    assert len(samples.order) == 4
