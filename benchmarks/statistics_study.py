"""How often does the interval hold the truth? Synthetic machines of known ratio, measured in the sampler's own order.

    python benchmarks/statistics_study.py --workers 2 --output benchmarks/results/reliability/statistics.json

A machine is a line of disturbances of its samples, one after the other, on whichever contender they fall: drift, two clocks,
bursts, autocorrelation. `collect` takes baseline, elastic and baseline again from it as it does from a real one, in mirrored
blocks; `ratio_interval` makes the interval of the ratio that was put in. Harder ones have a state of each contender's own,
which pairing cannot take out; there, and in the unpaired comparison of two runs (Welch), dependence must be seen to be allowed
for, and the file shows from how many samples on it is. A 95 % interval should hold the truth 93 to 97 % of the time, and say
'faster' of equals at most 2.5 % of the time. Each rate has the standard error that the file states beside it.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import product
from pathlib import Path

import numpy as np

from elastickv.benchmark.sampler import collect
from elastickv.benchmark.stats.intervals import Interval, beyond_noise, ratio_interval
from elastickv.benchmark.summary import AA_BASELINE

Stream = Callable[[np.random.Generator, int], np.ndarray]
SAMPLES, REPLICATIONS = (10, 20, 50, 100, 200), 2000
UNEQUAL, UNEQUAL_SAMPLES = (1.03, 1.5), (20, 100)
PAIRED, OWN, UNPAIRED = "paired", "paired, own state", "unpaired"
CONTENDERS = ("baseline", "elastic", AA_BASELINE)


def noise(deviation: float = 0.01) -> Stream:
    return lambda rng, n: deviation * rng.standard_normal(n)


def drift(total: float) -> Stream:
    return lambda rng, n: np.linspace(0, total, n)


def warming(total: float) -> Stream:
    return lambda rng, n: total * (1 - np.exp(-5 * np.arange(n) / n))


def wave(height: float, periods: float) -> Stream:
    return lambda rng, n: height * np.sin(2 * np.pi * (periods * np.arange(n) / n + rng.random()))


def clocks(height: float, dwell: float) -> Stream:
    """Two clocks, the change from one to the other after `dwell` samples on average."""
    return lambda rng, n: height * ((np.cumsum(rng.random(n) < 1 / dwell) + rng.integers(2)) % 2)


def bursts(share: float, tail: float = 1.5) -> Stream:
    """Pareto bursts of at least 10 % in some of the samples: below a tail of 2 their variance is infinite."""
    return lambda rng, n: np.log1p(np.where(rng.random(n) < share, 0.1 * rng.random(n) ** (-1 / tail), 0))


def lognormal(sigma: float) -> Stream:
    return lambda rng, n: np.log1p(0.02 * rng.lognormal(0, sigma, n))


def autocorrelated(rho: float, deviation: float = 0.02) -> Stream:
    """A first-order autoregression."""

    def stream(rng: np.random.Generator, n: int) -> np.ndarray:
        fresh = rng.standard_normal(n) * math.sqrt(1 - rho**2)
        state = np.empty(n)
        state[0] = rng.standard_normal()
        for i in range(1, n):
            state[i] = rho * state[i - 1] + fresh[i]
        return deviation * state

    return stream


def both(*streams: Stream) -> Stream:
    return lambda rng, n: sum((stream(rng, n) for stream in streams), np.zeros(n))


# What a machine does to the logarithms of its samples' times, one after the other.
MACHINES: dict[str, Stream] = {
    "noise": noise(),
    "drift of 20 %": both(noise(), drift(0.2)),
    "drift of 170 %": both(noise(), drift(1)),
    "warming up by 30 %": both(noise(), warming(0.3)),
    "wave of 10 %, three periods": both(noise(), wave(0.1, 3)),
    "two clocks, slow": both(noise(0.003), clocks(0.25, 20)),
    "two clocks, fast": both(noise(0.003), clocks(0.25, 2)),
    "Pareto bursts, 5 %": both(noise(), bursts(0.05)),
    "Pareto bursts, 10 %": both(noise(), bursts(0.1)),
    "lognormal, sigma 1": lognormal(1),
    "lognormal, sigma 1.5": lognormal(1.5),
    "AR(1), 0.3": autocorrelated(0.3),
    "AR(1), 0.6": autocorrelated(0.6),
    "AR(1), 0.9": autocorrelated(0.9),
    "AR(1), 0.98": both(noise(0.003), autocorrelated(0.98, 0.05)),
    "drift, two clocks, bursts, AR(1) 0.9": both(noise(), drift(0.1), clocks(0.1, 20), bursts(0.05), autocorrelated(0.9)),
}
# What happens to each contender by itself, round by round; in an unpaired comparison, to each run.
STATES: dict[str, Stream] = {
    "AR(1), 0.3": autocorrelated(0.3),
    "AR(1), 0.6": autocorrelated(0.6),
    "AR(1), 0.8": autocorrelated(0.8),
    "AR(1), 0.9": autocorrelated(0.9),
    "AR(1), 0.9, and as much noise": both(noise(0.02), autocorrelated(0.9)),
    "two clocks, 5 rounds": both(noise(), clocks(0.2, 5)),
}
APART: dict[str, Stream] = {
    name: MACHINES[name]
    for name in MACHINES
    if name.startswith(("noise", "two clocks, fast", "Pareto", "lognormal"))
} | STATES  # fmt: skip
KINDS = {PAIRED: MACHINES, OWN: STATES, UNPAIRED: APART}


@dataclass(frozen=True)
class Condition:
    """What is simulated: a stream of `KINDS[kind]`, samples of each contender, and the ratio of their times."""

    kind: str
    stream: str
    samples: int
    ratio: float


@dataclass(frozen=True)
class Rates:
    """What came of a condition.

    Attributes
    ----------
    coverage : share of intervals that hold the ratio.
    low, high : share of those that lie wholly below and above it.
    faster, slower : share of those that lie wholly above and below 1: of equals, how often a side is said to be faster.
    beyond_noise : share of runs whose result says "faster"; None where there is no second baseline.
    width : mean of the interval's width / the ratio.
    block_length : mean.
    standard_error : of the coverage, were it 95 %.
    """

    coverage: float
    low: float
    high: float
    faster: float
    slower: float
    beyond_noise: float | None
    width: float
    block_length: float
    standard_error: float


def measured(condition: Condition, seed: int) -> tuple[Interval, bool | None]:
    """Return one replication's interval of the ratio, and whether a result would say "faster"."""
    rng = np.random.default_rng([seed, condition.samples, round(100 * condition.ratio)])
    stream, n, ratio = KINDS[condition.kind][condition.stream], condition.samples, condition.ratio
    if condition.kind == UNPAIRED:
        a, b = (np.exp(stream(rng, n)) for _ in range(2))
        return ratio_interval(ratio * a, b, paired=False), None
    if condition.kind == OWN:
        lines = {name: iter(np.exp(stream(rng, n))) for name in CONTENDERS}
    else:
        line = iter(np.exp(stream(rng, n * len(CONTENDERS))))
        lines = dict.fromkeys(CONTENDERS, line)

    def timed(name: str) -> Callable[[], float]:
        factor = 1.0 if name == "elastic" else ratio
        return lambda: factor * next(lines[name])

    times = collect({name: timed(name) for name in CONTENDERS}, n, paired=True, seed=seed).times
    speedup, floor = (ratio_interval(times["baseline"], times[other]) for other in ("elastic", AA_BASELINE))
    return speedup, beyond_noise(speedup, floor)


def rates(condition: Condition, replications: int = REPLICATIONS) -> Rates:
    """Return the rates of a condition; the same arguments give the same rates."""
    runs = [measured(condition, seed) for seed in range(replications)]
    low, high = np.array([(interval.low, interval.high) for interval, _ in runs]).T
    said = [faster for _, faster in runs if faster is not None]
    return Rates(
        coverage=float(np.mean((low <= condition.ratio) & (condition.ratio <= high))),
        low=float(np.mean(high < condition.ratio)),
        high=float(np.mean(low > condition.ratio)),
        faster=float(np.mean(low > 1)),
        slower=float(np.mean(high < 1)),
        beyond_noise=float(np.mean(said)) if said else None,
        width=float(np.mean(high - low)) / condition.ratio,
        block_length=float(np.mean([interval.block_length for interval, _ in runs])),
        standard_error=math.sqrt(0.95 * 0.05 / replications),
    )


def conditions(kinds: list[str]) -> Iterator[Condition]:
    for kind in kinds:
        for stream, samples in product(KINDS[kind], SAMPLES):
            yield Condition(kind, stream, samples, 1.0)
        for stream, samples, ratio in product(KINDS[kind], UNEQUAL_SAMPLES, UNEQUAL if kind == PAIRED else ()):
            yield Condition(kind, stream, samples, ratio)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replications", type=int, default=REPLICATIONS)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    planned, measured_at = list(conditions(arguments.kinds)), commit()
    with ProcessPoolExecutor(arguments.workers) as pool:
        outcomes = list(pool.map(rates, planned, [arguments.replications] * len(planned)))
    rows = [asdict(condition) | asdict(rate) for condition, rate in zip(planned, outcomes, strict=True)]
    record = {
        "what": "rates over synthetic streams of known ratio; AR(1): coefficient from one sample to the next",
        "date_utc": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": measured_at,
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "command": ["python", "benchmarks/statistics_study.py", *sys.argv[1:]],
        "replications": arguments.replications,
        "level": 0.95,
        "interval_ms": milliseconds(),
        "summary": {kind: summary([row for row in rows if row["kind"] == kind]) for kind in arguments.kinds},
        "conditions": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, default=float)
    arguments.output.write_text(text + "\n", encoding="utf-8")
    for kind, extremes in record["summary"].items():
        print(kind, json.dumps(extremes))


def summary(rows: list[dict[str, float]]) -> dict[str, object]:
    """Return the extremes over conditions, and those outside 93 to 97 %."""
    equal = [row for row in rows if row["ratio"] == 1]
    said = [row["beyond_noise"] for row in equal if row["beyond_noise"] is not None]
    return {
        "conditions": len(rows),
        "coverage_least": min(row["coverage"] for row in rows),
        "coverage_mean": float(np.mean([row["coverage"] for row in rows])),
        "coverage_most": max(row["coverage"] for row in rows),
        "false_faster_mean": float(np.mean([row["faster"] for row in equal])),
        "false_faster_most": max(row["faster"] for row in equal),
        "false_slower_most": max(row["slower"] for row in equal),
        "result_says_faster_most": max(said, default=None),
        "outside": [
            f"{row['stream']}, {row['samples']} samples: {row['coverage']:.3f}"
            for row in rows
            if not 0.93 <= row["coverage"] <= 0.97
        ],
    }


def commit() -> str:
    """Return the commit that is checked out, with a mark if files under src are not as committed."""
    here = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain", "../src"], cwd=here, capture_output=True, text=True, check=False)
    return head + ("+changes" if changed.stdout.strip() else "")


def milliseconds() -> dict[str, float]:
    """Return what one interval takes by samples."""
    rng = np.random.default_rng(0)
    taken = {}
    for n in (10, 100, 1000, 10_000):
        a, b = np.exp(autocorrelated(0.6)(rng, n)), np.exp(noise()(rng, n))
        start = time.perf_counter()
        for _ in range(10):
            ratio_interval(a, b)
        taken[str(n)] = round(100 * (time.perf_counter() - start), 3)
    return taken


if __name__ == "__main__":
    from command_line import exit_with

    exit_with(main)
