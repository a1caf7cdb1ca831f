"""`elastickv doctor`."""

import time
from dataclasses import astuple
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

    from elastickv.backends import Backend, Ceilings
    from elastickv.benchmark.doctor import Finding

CEILING_SECONDS = 10
_MARKS = {"ok": ("ok", "green"), "absent": ("--", "yellow"), "broken": ("!!", "red")}


@click.command("doctor")
@click.option(
    "--compile-all", "compile_all_", is_flag=True, help="Compile every kernel for every architecture, print the table."
)
@click.option("--arch", help="With --compile-all: one architecture only, such as 9.0 or 90.")
@click.option("--no-ceilings", is_flag=True, help="Skip the measurement of the device's limits.")
def command(compile_all_: bool, arch: str | None, no_ceilings: bool) -> int:
    """Show what works on this machine, what each extra would add, what is broken and how to mend it.

    Exit 0 when something can be measured and nothing that is here is broken, else 1.
    """
    from elastickv.backends import load
    from elastickv.cli import bench
    from elastickv.cli.flags import with_flags
    from elastickv.errors import UsageError

    architectures = _architectures(arch, compile_all_)
    broken = 0
    for finding in _all_findings():
        mark, color = _MARKS[finding.state]
        click.echo(f"{click.style(mark, fg=color)}  {finding.topic}: {with_flags(finding.detail, bench.command)}")
        if finding.remedy:
            verb = "mend" if finding.state == "broken" else "to get it"
            click.echo(f"      {verb}: {with_flags(finding.remedy, bench.command)}")
        broken += finding.state == "broken"
    try:
        backend, skip_reason = load()
    except UsageError as error:
        click.echo(f"!!  nothing can be measured: {with_flags(str(error), bench.command)}")
        return 1
    click.echo(
        f"will use: {backend.name} ({backend.device.name})"
        + (f", because {with_flags(skip_reason, bench.command)}" if skip_reason else "")
    )
    if not no_ceilings:
        limits = _ceilings(backend)
        click.echo(
            f"measured ceilings: read {limits.read_gbs:.1f} GB/s, copy {limits.copy_gbs:.1f} GB/s, "
            f"{limits.flops / 1e9:.0f} GFLOP/s"
        )
    if compile_all_:
        broken += _compile_everything(architectures)
    return 1 if broken else 0


def _all_findings() -> "Iterator[Finding]":
    """Yield what works now: the machine, then commands; then what each extra would add."""
    from elastickv.benchmark.doctor import findings
    from elastickv.cli.extras import commands_that_work, declared_extras, extra_findings

    extras, can_measure = declared_extras(), False
    for finding in findings():
        can_measure |= finding.topic == "cpu backend" and finding.state == "ok"
        yield finding
    yield commands_that_work(extras, can_measure)
    yield from extra_findings(extras)


def _ceilings(backend: "Backend") -> "Ceilings":
    from elastickv.cli.progress import Bar

    start = time.monotonic()
    with Bar() as bar:
        bar.phase("measuring the ceilings of the device")
        limits = backend.ceilings()
        while (passed := time.monotonic() - start) < CEILING_SECONDS:
            bar.progress(int(1000 * passed), 1000 * CEILING_SECONDS)
            limits = limits.at_least(backend.ceilings())
    return limits


def _architectures(arch: str | None, compiling: bool) -> tuple[str, ...]:
    from elastickv.backends.cuda.compiler import ARCHITECTURES
    from elastickv.errors import UsageError

    if arch is None:
        return ARCHITECTURES
    if not compiling:
        raise UsageError("--arch says what --compile-all compiles: give both")
    if arch.replace(".", "") not in ARCHITECTURES:
        accepted = ", ".join(f"{a[:-1]}.{a[-1]}" for a in ARCHITECTURES)
        raise UsageError(f"--arch={arch} is unknown: choose {accepted}")
    return (arch.replace(".", ""),)


def _compile_everything(architectures: tuple[str, ...]) -> int:
    from elastickv.backends.cuda.builds import all_variants, compile_all
    from elastickv.cli.progress import Bar

    spilling, variants = 0, sum(1 for _ in all_variants(architectures))
    done: set[tuple[str, str, str]] = set()
    with Bar() as bar:
        bar.phase(f"compiling {variants} variants of the kernels")
        print("kernel | architecture | parameters | registers | spills | shared bytes | seconds")
        for row in compile_all(architectures):
            print(" | ".join(map(str, astuple(row))), flush=True)
            spilling += row.spill_bytes > 0 and int(row.arch) >= 80
            done.add((row.kernel.partition(":")[0], row.arch, row.parameters))
            bar.progress(len(done), variants)
    return spilling
