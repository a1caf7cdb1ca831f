"""One benchmark run, from options to a result."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from statistics import median

from elastickv.backends import Backend, Ceilings, load
from elastickv.backends.compilation_report import Interruption
from elastickv.backends.driver_errors import device_failures
from elastickv.benchmark.accuracy import ReplayTimeout, SampleAccuracy, check_range, replay, sample_shape
from elastickv.benchmark.environment import environment
from elastickv.benchmark.options import Options
from elastickv.benchmark.prepare import ContenderSet, check_memory, prepare
from elastickv.benchmark.reporter import SILENT, Reporter
from elastickv.benchmark.result import RecipeErrors, Result, RunTime
from elastickv.benchmark.sample_inputs import Sample, load_sample
from elastickv.benchmark.sampler import Samples, collect
from elastickv.benchmark.sequential_decode import ROUNDS, CycleSamples, CycleTimeout, run_cycle
from elastickv.benchmark.summary import AA_BASELINE, Summary, speedup_interval
from elastickv.benchmark.telemetry import Telemetry
from elastickv.benchmark.time_budget import TimeBudget, TimedPhases, opening
from elastickv.errors import UsageError
from elastickv.recipe import FORMATS, Recipe
from elastickv.recipe.formats import ScaleLayout

# Of a time limit, what is over when the recipe error and the ceilings are measured at the latest.
ACCURACY_SHARE, CEILINGS_SHARE, FALLBACK_SHARE = 0.35, 0.4, 0.6
# Of what is then left, what the inference cycle and the warm-up take; and of the whole limit, what samples take at least.
CYCLE_SHARE = 1 / 3
WARMUP_SHARE = 0.1
LEAST_SHARE = 0.1
CYCLE_GRACE = 0.3  # of the limit, by which one round of a requested cycle may exceed it
CEILING_ROUNDS = 3


def run(options: Options, reporter: Reporter | None = None, started: float | None = None) -> Result:
    """Measure dense and elastic decode attention as `options` say.

    Parameters
    ----------
    started : reading of `time.monotonic` from which the time limit counts; None is now.

    Raises
    ------
    UsageError : if the options cannot be met on this machine; RanOut where its memory ran out on the way.
    KernelMismatch, NonFiniteError : if a figure would be wrong.
    DeviceFailure : if the device or its compiler failed; DeviceLost where nothing more can be measured in this process.
    KeyboardInterrupt : if interrupted before anything was measured; later, the result is marked incomplete.
    """
    with device_failures():
        return _run(options, TimedPhases(reporter or SILENT), TimeBudget(options.time_limit_s, started))


def _run(options: Options, report: TimedPhases, budget: TimeBudget) -> Result:
    if note := opening(options):
        report.phase("loading", note)
    sample = load_sample(options.input)
    check_range(sample, options.dtype)
    backend, skip_reason = load(options.backend, options.device, report=Interruption(report, lambda: report.name))
    recipe = options.resolved_recipe
    layers = check_memory(backend, options, recipe)
    here = environment()
    report.phase(f"checking {recipe} on real activations")
    on_sample = _on_sample(backend, options, sample, recipe, budget, report)
    report.phase("measuring the ceilings of the device")
    ceilings, ceilings_s = _highest_ceilings(backend, budget, report, CEILINGS_SHARE)
    field = prepare(backend, options, recipe, sample.query_rms, report.phase, budget)
    recipe = field.recipe
    if field.fallback:
        report.phase(f"checking {recipe} on real activations")
        on_sample = OnSample(_replayed(backend, sample.at(options.seq), recipe, field.dtype, budget, report, FALLBACK_SHARE))
    with Telemetry(backend.device.kind, options.device or 0) as telemetry:
        limit = _sampling_s(options, field, layers, ceilings_s, budget)
        samples = _measure(options, field, report, lambda: bool(telemetry.snapshot()["flags"]), limit)
        cycle, complete = None, samples.complete
        try:
            for contender in (field.own_dense, field.elastic, *field.peers):
                contender.check()
                contender.close()
            if complete and options.inference:
                report.phase("inference cycle")
                cycle = _cycle(backend, options, field, sample, layers, report.progress, samples, budget)
                complete = cycle is None or cycle.complete
            if complete and budget.has_room("ceilings after the samples", ceilings_s):
                report.phase("measuring the ceilings again")
                ceilings = ceilings.at_least(_highest_ceilings(backend, budget, report)[0])
        except KeyboardInterrupt:
            # The result keeps what was measured before and is marked incomplete.
            complete = False
    report.end()
    _note_fewer(options, samples, cycle, layers, budget)
    run_time = RunTime(budget.limit_s, budget.elapsed_s, report.seconds, budget.left_out)
    return Summary(options, backend, field, ceilings, samples, cycle, complete, run_time).result(
        RecipeErrors(sample.name, field.kernel_error, on_sample.accuracy, on_sample.refused, on_sample.differs),
        telemetry,
        here,
        skip_reason,
    )


def _highest_ceilings(backend: Backend, budget: TimeBudget, report: Reporter, share: float = 1.0) -> tuple[Ceilings, float]:
    """Return the best of a few measurements, since another program may disturb one of them, and the seconds of the longest."""
    measured, longest = list[Ceilings](), 0.0
    while len(measured) < CEILING_ROUNDS and (not measured or longest <= budget.left_s(share)):
        start = time.monotonic()
        measured.append(backend.ceilings())
        longest = max(longest, time.monotonic() - start)
        report.progress(len(measured), CEILING_ROUNDS)
    return reduce(Ceilings.at_least, measured), longest


@dataclass(frozen=True)
class OnSample:
    """The errors on the sample; why they could not be had as they should, and how their recipe differs from the timed one."""

    accuracy: SampleAccuracy | None
    refused: str | None = None
    differs: str | None = None


def _on_sample(
    backend: Backend, options: Options, sample: Sample, timed: Recipe, budget: TimeBudget, report: Reporter = SILENT
) -> OnSample:
    """Return the errors of the timed recipe at the sample's tokens nearest to the timed context.

    Where the sample is shorter than that, or its heads do not take the recipe, one is solved for the sample at the same ratio.
    """
    sample, longest = sample.at(options.seq), sample.tokens
    shape = sample_shape(sample)
    recipe, why = timed, f"it is shorter than {options.seq}" if options.seq > longest else None
    try:
        timed.check_shape(shape.head_dim, shape.kv_heads)
        fits = True
    except UsageError as error:
        why, fits = str(error), False
    refused = None
    if why:
        try:
            recipe = options.recipe_at(sample.tokens, shape)
        except UsageError as error:
            if not fits:
                return OnSample(None, str(error))
            refused = str(error)
    differs = None
    if recipe != timed:
        differs = f"solved anew for C={options.compress:g} at the sample's {sample.tokens} tokens: {why}"
    elif _has_value_groups(timed) and timed.v_group(shape.head_dim) != timed.v_group(options.dim):
        differs = f"values share a scale over the sample's {shape.head_dim} channels, not over {options.dim}"
    return OnSample(_replayed(backend, sample, recipe, options.dtype, budget, report), refused, differs)


def _has_value_groups(recipe: Recipe) -> bool:
    return recipe.value_format is not None and FORMATS[recipe.value_format].values is ScaleLayout.GROUP


def _replayed(
    backend: Backend,
    sample: Sample,
    recipe: Recipe,
    dtype: str,
    budget: TimeBudget,
    report: Reporter,
    share: float = ACCURACY_SHARE,
) -> SampleAccuracy | None:
    """Return the accuracy on the sample; None where the time limit is too short for it."""
    try:
        return replay(backend, sample, recipe, dtype, budget.left_s(share), report.progress)
    except ReplayTimeout as error:
        budget.left_out["recipe error"] = str(error)
        return None


def _sampling_s(options: Options, field: ContenderSet, layers: int, ceilings_s: float, budget: TimeBudget) -> float | None:
    """Return the seconds for warm-up and samples, what cycle and ceilings leave but never nothing; None without a limit."""
    if budget.limit_s is None:
        return None
    left = budget.left_s() - ceilings_s
    if options.inference:
        step_ms = field.own_dense.sample() + field.elastic.sample()
        left -= max(CYCLE_SHARE * left, 2 * _round_s(options, layers, step_ms))
    return max(left, LEAST_SHARE * budget.limit_s)


def _round_s(options: Options, layers: int, step_ms: float) -> float:
    """Return about the seconds of one round of the inference cycle, of a dense and an elastic step of `step_ms` together."""
    return step_ms / 1e3 * layers * options.decode_tokens


def _note_fewer(options: Options, samples: Samples, cycle: CycleSamples | None, layers: int, budget: TimeBudget) -> None:
    """Note what the time limit has shortened."""
    if budget.limit_s is None:
        return
    if samples.warmup < options.warmup:
        budget.left_out["warm-up"] = f"{samples.warmup} of {options.warmup} rounds were taken"
    if cycle is not None and cycle.complete and (rounds := len(cycle.latencies["elastic"])) < ROUNDS:
        budget.left_out["rounds of the inference cycle"] = f"{rounds} of {ROUNDS} were taken"
    if cycle is not None and cycle.layers < layers:
        budget.left_out["layers of the inference cycle"] = f"{cycle.layers} of {layers} were taken"


def _measure(
    options: Options,
    field: ContenderSet,
    report: Reporter,
    disturbed: Callable[[], bool],
    limit: float | None,
) -> Samples:
    entrants = {"baseline": field.baseline, "elastic": field.elastic, AA_BASELINE: field.baseline}
    entrants |= {peer.name: peer for peer in field.peers if peer is not field.baseline}
    if field.own_dense is not field.baseline:
        entrants[field.own_dense.name] = field.own_dense
    timed = {name: contender.sample for name, contender in entrants.items()}
    report.phase("warming up")
    warmup = _warm_up(options, field, timed, None if limit is None else limit * WARMUP_SHARE, report.progress)
    report.phase(f"measuring {field.recipe} against {field.baseline.name}")
    if limit is not None:
        limit *= 1 - WARMUP_SHARE
    target = options.until_ci_percent

    def converged(samples: Samples) -> bool:
        if target is None or samples.rounds < 10:
            return False
        return speedup_interval(samples, options).half_width * 100 <= target

    samples = collect(
        timed,
        options.reps,
        paired=options.paired,
        seed=options.seed,
        time_limit_s=limit,
        converged=converged if target is not None else None,
        progress=report.progress,
        disturbed=disturbed,
    )
    samples.warmup = warmup
    if min(len(samples.times["baseline"]), len(samples.times["elastic"])) < 2:
        raise KeyboardInterrupt
    return samples


def _warm_up(
    options: Options,
    field: ContenderSet,
    timed: dict[str, Callable[[], float]],
    within_s: float | None,
    progress: Callable[[int, int], None],
) -> int:
    """Take samples and discard them; return how many of each: none where a block of them does not fit into the time."""
    block_s = 2 * len(timed) * field.candidates_ms[field.baseline.name] / 1e3 * field.baseline.rotation.steps
    if not options.warmup or (within_s is not None and block_s > within_s):
        return 0
    warming = collect(timed, options.warmup, paired=True, seed=options.seed, time_limit_s=within_s, progress=progress)
    if not warming.complete:
        raise KeyboardInterrupt
    return warming.rounds


def _cycle(
    backend: Backend,
    options: Options,
    field: ContenderSet,
    sample: Sample,
    layers: int,
    progress: Callable[[int, int], None],
    samples: Samples,
    budget: TimeBudget,
) -> CycleSamples | None:
    """Return the inference cycle; None where the time limit is too short for one round of it."""
    dense = samples.times.get(field.own_dense.name) or samples.times["baseline"]
    step_ms = median(dense) + median(samples.times["elastic"])
    try:
        return run_cycle(
            backend,
            field.recipe,
            options.shape,
            options.seq,
            options.decode_tokens,
            field.dtype,
            field.own_dense.dtype,
            sample,
            layers=layers,
            graph=options.graphs,
            seed=options.seed,
            time_limit_s=None if budget.limit_s is None else budget.left_s(),
            grace_s=CYCLE_GRACE * (budget.limit_s or 0.0),
            round_s=_round_s(options, layers, step_ms),
            progress=progress,
        )
    except CycleTimeout as error:
        budget.left_out["inference cycle"] = str(error)
        return None
