"""The order of measurement: contenders interleaved in randomized mirrored blocks, or one after the other."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Samples:
    """Times of every contender, in the order they were taken.

    Attributes
    ----------
    times : contender name -> times, one a round.
    order : names in the order measured.
    complete : False after Ctrl-C.
    stopped_by : 'reps', 'time limit', 'interval' or 'interrupt'.
    flagged : contender name -> indices of the samples taken while something was disturbed.
    warmup : rounds that were discarded before.
    """

    times: dict[str, list[float]]
    order: list[str] = field(default_factory=list)
    complete: bool = True
    stopped_by: str = "reps"
    flagged: dict[str, list[int]] = field(default_factory=dict)
    warmup: int = 0

    @property
    def rounds(self) -> int:
        """Rounds in which every contender was measured."""
        return min(map(len, self.times.values()))


def schedule(names: list[str], reps: int, paired: bool, seed: int) -> Iterator[str]:
    """Yield the contender to measure next.

    Paired: blocks of two rounds, a random permutation and then its mirror image (ABBA), so that a linear drift cancels.
    Otherwise: all rounds of the first, then of the next, as the original micro-benchmark does.
    """
    if not paired:
        for name in names:
            yield from [name] * reps
        return
    rng = np.random.default_rng(seed)
    for block in range(0, reps, 2):
        order = [names[i] for i in rng.permutation(len(names))]
        yield from order
        if block + 1 < reps:
            yield from reversed(order)


def collect(
    contenders: Mapping[str, Callable[[], float]],
    reps: int,
    *,
    paired: bool,
    seed: int = 0,
    time_limit_s: float | None = None,
    converged: Callable[[Samples], bool] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    disturbed: Callable[[], bool] = lambda: False,
) -> Samples:
    """Measure every contender `reps` times.

    Parameters
    ----------
    contenders : name -> a function that takes one sample and returns its time.
    time_limit_s : stop before a block that, as long as those before, would end after this many seconds; the first one is always
        taken. Unpaired: shared out evenly, two samples of each at least.
    converged : called after every block of a paired run; True stops it.
    progress : called with the samples done and planned.
    disturbed : called after every sample; a sample for which it is True is marked.

    Ctrl-C stops the run; what was measured is returned, marked incomplete.
    """
    names = list(contenders)
    samples = Samples({name: [] for name in names})
    total, block = reps * len(names), 2 * len(names)
    start = time.monotonic()
    late: set[str] = set()
    try:
        for done, name in enumerate(schedule(names, reps, paired, seed)):
            elapsed = time.monotonic() - start
            if paired and done and done % block == 0:
                if time_limit_s is not None and elapsed * (1 + block / done) > time_limit_s:
                    samples.stopped_by = "time limit"
                    break
                if converged is not None and converged(samples):
                    samples.stopped_by = "interval"
                    break
            if not paired and time_limit_s is not None and len(samples.times[name]) >= 2:
                share = time_limit_s * (names.index(name) + 1) / len(names)
                if elapsed > share:
                    late.add(name)
                    continue
            samples.times[name].append(contenders[name]())
            samples.order.append(name)
            if disturbed():
                samples.flagged.setdefault(name, []).append(len(samples.times[name]) - 1)
            progress(done + 1, total)
    except KeyboardInterrupt:
        samples.complete, samples.stopped_by = False, "interrupt"
    if late:
        samples.stopped_by = "time limit"
    if paired:
        rounds = samples.rounds
        samples.order = samples.order[: rounds * len(names)]
        samples.times = {name: times[:rounds] for name, times in samples.times.items()}
        samples.flagged = {name: [i for i in flagged if i < rounds] for name, flagged in samples.flagged.items()}
    return samples
