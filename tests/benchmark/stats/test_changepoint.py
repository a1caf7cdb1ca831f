"""A change of speed is noticed: by the samples on synthetic machines, and by telemetry under a real competing load."""

import math
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from benchmarks.statistics_study import MACHINES
from elastickv.benchmark import Options, run
from elastickv.benchmark.reporter import SilentReporter
from elastickv.benchmark.stats.changepoint import CHANCE, LEAST_STEP, find_changepoint
from elastickv.benchmark.telemetry_probes import ProcfsProbe, UnavailableError

STEADY = ["noise", "two clocks, fast", "Pareto bursts, 10 %", "lognormal, sigma 1.5", "AR(1), 0.6", "AR(1), 0.9"]


@pytest.mark.parametrize("machine", STEADY)
@pytest.mark.parametrize("n", [20, 200])
def test_a_steady_machine_raises_no_alarm(machine, n):
    alarms = sum(
        find_changepoint(np.exp(MACHINES[machine](np.random.default_rng([seed, n]), n))) is not None for seed in range(1000)
    )
    assert alarms <= 2


def published_shift(times):
    """Pettitt's K, where it is reached and his approximate probability; equal times are ranked in their order."""
    n = len(times)
    ranks = {place: rank for rank, place in enumerate(sorted(range(n), key=lambda i: times[i]), 1)}
    heights = [abs(2 * sum(ranks[i] for i in range(t)) - t * (n + 1)) for t in range(1, n + 1)]
    first = heights.index(max(heights)) + 1
    return first, 2 * math.exp(-6 * max(heights) ** 2 / (n**3 + n**2))


@pytest.mark.parametrize("levels", [3, 1000])
def test_a_change_is_where_and_as_likely_as_published(levels):
    for seed in range(300):
        rng = np.random.default_rng([seed, levels])
        n = int(rng.integers(24, 60))
        times = np.round(1 + rng.random(n) * 0.3, 12 if levels == 1000 else 1)
        times[n // 2 :] *= 1 + rng.uniform(0, 0.4)
        first, probability = published_shift(times.tolist())
        ratio = np.median(times[first:]) / np.median(times[:first]) if first < n else 1.0
        expected = probability <= CHANCE and max(ratio, 1 / ratio) >= LEAST_STEP
        found = find_changepoint(times)
        assert (found is not None) == expected and (found is None or found.sample == first)


@pytest.mark.parametrize("machine", STEADY)
@pytest.mark.parametrize(("begin", "end"), [(50, 100), (30, 100), (25, 75)])
def test_a_throttled_part_is_noticed(machine, begin, end):
    noticed = 0
    for seed in range(100):
        times = np.exp(MACHINES[machine](np.random.default_rng([seed, 3]), 100))
        times[begin:end] *= 1.6
        found = find_changepoint(times)
        noticed += found is not None and max(found.ratio, 1 / found.ratio) > 1.1
    assert noticed >= 80


def test_where_it_begins_and_how_much_it_is():
    times = np.exp(MACHINES["noise"](np.random.default_rng(1), 100))
    times[60:] *= 1.5
    found = find_changepoint(times)
    assert found.sample == 60
    assert found.ratio == pytest.approx(1.5, abs=0.02)


def test_half_of_24_samples_are_the_fewest_that_tell():
    # Ranks that part in the middle: Pettitt's statistic is (n / 2)^2, and 2 exp(-6 (n / 2)^4 / (n^3 + n^2)) is 7.5e-4 of 22
    # samples and 3.5e-4 of 24.
    assert find_changepoint([2.0] * 11 + [3.0] * 11) is None
    found = find_changepoint([2.0] * 12 + [3.0] * 12)
    assert (found.sample, found.ratio) == (12, 1.5)


def test_a_step_of_a_tenth_is_told_and_none_below_it():
    assert find_changepoint([10.0] * 12 + [11.0] * 12).ratio == find_changepoint([11.0] * 12 + [10.0] * 12).ratio ** -1 == 1.1
    assert find_changepoint([10.0] * 12 + [10.99] * 12) is None


def test_a_step_at_either_end_is_never_told_by_fewer_than_five_samples():
    for n in (24, 100, 400):
        for few in (1, 4):
            assert find_changepoint([1.0] * (n - few) + [9.0] * few) is None
            assert find_changepoint([9.0] * few + [1.0] * (n - few)) is None


def test_too_few_samples_tell_nothing():
    assert find_changepoint([1.0] * 9 + [2.0] * 10) is None


class Loading(SilentReporter):
    """Lets busy processes loose on every processor after some seconds of samples; ends them, and the samples, later."""

    def __init__(self, after_s, until_s):
        self.after_s, self.until_s, self.busy, self.taken, self.timer = after_s, until_s, [], None, None
        self.measuring = False

    def phase(self, name):
        if self.timer is not None:
            self.stop()
        self.measuring = name.startswith("measuring ") and " against " in name

    def progress(self, done, total):
        if not self.measuring:
            return
        if self.timer is None:
            self.began = time.monotonic()
            self.timer = threading.Timer(self.after_s, self.load)
            self.timer.start()
        if self.busy and self.taken is None:
            self.taken = done
        if time.monotonic() - self.began > self.until_s:
            raise KeyboardInterrupt

    def load(self):
        spin = [sys.executable, "-c", "while True: pass"]
        self.busy = [subprocess.Popen(spin) for _ in range(os.cpu_count() or 1)]

    def stop(self):
        self.timer.cancel()
        self.timer.join()
        for process in self.busy:
            process.kill()
            process.wait()


def test_a_competing_load_is_noticed_and_its_samples_are_marked(monkeypatch):
    monkeypatch.setattr(sys.modules[run.__module__], "CEILING_ROUNDS", 1)
    try:
        if ProcfsProbe().read()["load_1m"] is None:
            pytest.skip("/proc/loadavg tells nothing here")
    except UnavailableError as reason:
        pytest.skip(str(reason))
    options = Options(
        seq=1024, heads=4, recipe="int8", compress=1, reps=100_000, warmup=2, inner_loops=32, paired=True,
        dense="bf16", backend="cpu",
    )  # fmt: skip
    loading = Loading(after_s=1.5, until_s=4.0)
    try:
        result = run(options, loading)
    finally:
        loading.stop()
    rounds = len(result.samples["baseline"])
    assert loading.taken is not None
    contenders = len(result.samples)
    under_load = range(min(rounds - 1, loading.taken // contenders + rounds // 10), rounds)
    flagged = set(result.flagged_samples["elastic"])
    assert len(flagged.intersection(under_load)) >= 0.8 * len(under_load)
    assert any(warning.startswith("other processes used more than") for warning in result.warnings)
    # Dense against itself: the load fell on both alike.
    assert result.noise_floor.low < 1.1
    assert result.noise_floor.high > 1 / 1.1
