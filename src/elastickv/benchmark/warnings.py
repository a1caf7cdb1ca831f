"""What a reader must know before believing a result."""

from collections.abc import Iterator

from elastickv.benchmark.result import Result
from elastickv.benchmark.stats.changepoint import find_changepoint
from elastickv.recipe import PAGE_TOKENS

# A ceiling is itself a measurement: an attention kernel this little above it has not beaten it.
CEILING_SLACK = 1.02
OVER_TIME = 1.2  # of a time limit, above which it was not met


def collect_warnings(result: Result) -> Iterator[str]:
    """Yield one line for each thing that limits what `result` shows."""
    configuration, recipe, build = result.configuration, result.recipe, result.build
    if recipe.ratio_read < configuration.compression:
        yield (
            f"the budget is not met: {recipe.text} reads 1/{recipe.ratio_read:.2f} of the dense 16-bit bytes, "
            f"not 1/{configuration.compression:g} as requested"
        )
    if configuration.dense is not None:
        yield f"dense was measured in {configuration.dense} only, as asked: another dtype may be faster"
    if build.inner_loops != build.inner_loops_requested:
        yield (
            f"inner_loops was raised from {build.inner_loops_requested} to {build.inner_loops}: a sample spans whole anchor "
            "intervals and a whole cold rotation"
        )
    if configuration.cache == "cold":
        for contender in result.contenders:
            if not contender.cold:
                yield (
                    f"{contender.name} goes round {contender.touched_bytes / 2**20:.1f} MiB, which the last-level cache of "
                    f"{result.gpu.last_level_cache_bytes / 2**20:.0f} MiB may hold: not a cold-cache figure"
                )
    cycle = result.inference_cycle
    if cycle is not None and cycle.decode_tokens % PAGE_TOKENS:
        yield f"{cycle.decode_tokens} decoded tokens are not whole quantization cycles of {PAGE_TOKENS} tokens"
    for name, why in result.baseline.not_run.items():
        yield f"{name} was not measured: {why}"
    refused, accuracy = result.fidelity.sample_refused, result.fidelity.sample
    if refused:
        what = (
            f"the recipe error on the sample is of {accuracy.recipe} as timed" if accuracy else "no recipe error on the sample"
        )
        yield f"{what}: {refused}"
    if not result.convergence.converged:
        yield f"not converged: the interval's half-width is {result.convergence.half_width_percent:.2f} %"
    if result.convergence.stopped_by == "time limit":
        yield f"stopped by the time limit after {result.convergence.rounds} of {configuration.reps} samples"
    yield from _time_limit(result)
    if not result.complete:
        yield "interrupted: incomplete"
    if not configuration.paired_baseline:
        yield "dense and elastic were measured one after the other: --paired-baseline interleaves them"
    if configuration.cache == "hot":
        yield "hot cache: bandwidth, efficiency and roofline relate to memory, not to the cache that was read"
    elif any(point.score > CEILING_SLACK for point in result.roofline.values()):
        yield "an attention kernel beat the measured ceilings: the ceilings were measured too low"
    changed = find_changepoint(result.samples["baseline"])
    if changed is not None:
        yield (
            f"the device changed its speed while it was measured: from sample {changed.sample} of "
            f"{len(result.samples['baseline'])} on the baseline takes {changed.ratio:.2f} times as long as before"
        )
    yield from result.telemetry["flags"]
    if result.telemetry["note"]:
        yield f"the device was not watched all the time: {result.telemetry['note']}"


def _time_limit(result: Result) -> Iterator[str]:
    """Yield what the time limit left out, and by how much the run exceeded it."""
    taken = result.run_time
    if taken is None or taken.limit_s is None:
        return
    for what, why in taken.left_out.items():
        yield f"left out: {what}: {why}"
    if taken.total_s > OVER_TIME * taken.limit_s and taken.phases_s:
        longest = max(taken.phases_s, key=lambda name: taken.phases_s[name])
        yield (
            f"the run took {taken.total_s:.0f} s with a time limit of {taken.limit_s:g} s: {longest} took "
            f"{taken.phases_s[longest]:.0f} s"
        )
