"""One benchmark run, from options to a result."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

from elastickv.backends import Backend, Ceilings, load
from elastickv.backends.driver_errors import device_failures
from elastickv.benchmark.accuracy import SampleAccuracy, check_range, replay, sample_shape
from elastickv.benchmark.environment import environment
from elastickv.benchmark.options import Options
from elastickv.benchmark.prepare import ContenderSet, check_memory, prepare
from elastickv.benchmark.reporter import Reporter, SilentReporter
from elastickv.benchmark.result import RecipeErrors, Result
from elastickv.benchmark.sample_inputs import Sample, load_sample
from elastickv.benchmark.sampler import Samples, collect
from elastickv.benchmark.sequential_decode import CycleSamples, run_cycle
from elastickv.benchmark.summary import AA_BASELINE, Summary, speedup_interval
from elastickv.benchmark.telemetry import Telemetry
from elastickv.errors import UsageError
from elastickv.recipe import Recipe

CYCLE_SHARE = 1 / 3
WARMUP_SHARE = 0.1
CEILING_ROUNDS = 3


def run(options: Options, reporter: Reporter | None = None) -> Result:
    """Measure dense and elastic decode attention as `options` say.

    Raises
    ------
    UsageError : if the options cannot be met on this machine; RanOut where its memory ran out on the way.
    KernelMismatch, NonFiniteError : if a figure would be wrong.
    DeviceFailure : if the device or its compiler failed; DeviceLost where nothing more can be measured in this process.
    KeyboardInterrupt : if interrupted before anything was measured; later, the result is marked incomplete.
    """
    with device_failures():
        return _run(options, reporter or SilentReporter())


def _run(options: Options, report: Reporter) -> Result:
    sample = load_sample(options.input)
    check_range(sample, options.dtype)
    backend, skip_reason = load(options.backend, options.device, report=report)
    recipe = options.resolved_recipe
    layers = check_memory(backend, options, recipe)
    here = environment()
    report.phase(f"checking {recipe} on real activations")
    on_sample = _on_sample(backend, options, sample, recipe)
    report.phase("measuring the ceilings of the device")
    ceilings = _highest_ceilings(backend)
    field = prepare(backend, options, recipe, sample.query_rms, report.phase)
    recipe = field.recipe
    if field.fallback:
        on_sample = OnSample(replay(backend, sample.at(options.seq), recipe, field.dtype))
    with Telemetry(backend.device.kind, options.device or 0) as telemetry:
        report.phase(f"measuring {recipe} against {field.baseline.name}")
        samples = _measure(options, field, report.progress, lambda: bool(telemetry.snapshot()["flags"]))
        cycle, complete = None, samples.complete
        try:
            for contender in (field.own_dense, field.elastic, *field.peers):
                contender.check()
                contender.close()
            if complete and options.inference:
                report.phase("inference cycle")
                cycle = _cycle(backend, options, field, sample, layers, report.progress)
                complete = cycle.complete
            if complete:
                report.phase("measuring the ceilings again")
                ceilings = ceilings.at_least(_highest_ceilings(backend))
        except KeyboardInterrupt:
            # The result keeps what was measured before and is marked incomplete.
            complete = False
    return Summary(options, backend, field, ceilings, samples, cycle, complete).result(
        RecipeErrors(sample.name, field.kernel_error, on_sample.accuracy, on_sample.refused, on_sample.differs),
        telemetry,
        here,
        skip_reason,
    )


def _highest_ceilings(backend: Backend) -> Ceilings:
    """Return the best of a few measurements: on a shared machine another program may disturb one of them."""
    return reduce(Ceilings.at_least, (backend.ceilings() for _ in range(CEILING_ROUNDS)))


@dataclass(frozen=True)
class OnSample:
    """The errors on the sample; why they could not be had as they should, and how their recipe differs from the timed one."""

    accuracy: SampleAccuracy | None
    refused: str | None = None
    differs: str | None = None


def _on_sample(backend: Backend, options: Options, sample: Sample, timed: Recipe) -> OnSample:
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
    elif timed.value_format == "int4" and timed.v_group(shape.head_dim) != timed.v_group(options.dim):
        differs = f"values share a scale over the sample's {shape.head_dim} channels, not over {options.dim}"
    return OnSample(replay(backend, sample, recipe, options.dtype), refused, differs)


def _measure(
    options: Options, field: ContenderSet, progress: Callable[[int, int], None], disturbed: Callable[[], bool]
) -> Samples:
    entrants = {"baseline": field.baseline, "elastic": field.elastic, AA_BASELINE: field.baseline}
    entrants |= {peer.name: peer for peer in field.peers if peer is not field.baseline}
    if field.own_dense is not field.baseline:
        entrants[field.own_dense.name] = field.own_dense
    timed = {name: contender.sample for name, contender in entrants.items()}
    limit = options.time_limit_s
    if limit is not None and options.inference:
        limit *= 1 - CYCLE_SHARE
    if options.warmup:
        warming_s = None if limit is None else limit * WARMUP_SHARE
        if not collect(timed, options.warmup, paired=True, seed=options.seed, time_limit_s=warming_s).complete:
            raise KeyboardInterrupt
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
        progress=progress,
        disturbed=disturbed,
    )
    if min(len(samples.times["baseline"]), len(samples.times["elastic"])) < 2:
        raise KeyboardInterrupt
    return samples


def _cycle(
    backend: Backend,
    options: Options,
    field: ContenderSet,
    sample: Sample,
    layers: int,
    progress: Callable[[int, int], None],
) -> CycleSamples:
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
        time_limit_s=None if options.time_limit_s is None else options.time_limit_s * CYCLE_SHARE,
        progress=progress,
    )
