"""`elastickv doctor`."""

import sys
import time
from dataclasses import astuple

import click

CEILING_SECONDS = 10
_MARKS = {"ok": ("ok", "green"), "absent": ("--", "yellow"), "broken": ("!!", "red")}


@click.command("doctor")
@click.option(
    "--compile-all", "compile_all_", is_flag=True, help="Compile every kernel for every architecture, print the table."
)
@click.option("--no-ceilings", is_flag=True, help="Skip the measurement of the device's limits.")
def command(compile_all_: bool, no_ceilings: bool) -> int:
    """Say what was found, what will be used, what is missing and how to get it.

    Exit 0 when something can be measured and nothing that is here is broken, else 1.
    """
    from elastickv.backends import load
    from elastickv.bench.diagnosis import findings
    from elastickv.errors import UsageError

    broken = 0
    for finding in findings():
        mark, colour = _MARKS[finding.state]
        click.echo(f"{click.style(mark, fg=colour)}  {finding.topic}: {finding.detail}")
        if finding.remedy:
            click.echo(f"      mend: {finding.remedy}")
        broken += finding.state == "broken"
    try:
        backend, passed_over = load()
    except UsageError as error:
        click.echo(f"!!  nothing can be measured: {error}")
        return 1
    click.echo(f"will use: {backend.name} ({backend.device.name})" + (f", because {passed_over}" if passed_over else ""))
    if not no_ceilings:
        end = time.monotonic() + CEILING_SECONDS
        limits = backend.ceilings()
        while time.monotonic() < end:
            limits = limits.at_least(backend.ceilings())
        click.echo(
            f"measured ceilings: read {limits.read_gbs:.1f} GB/s, copy {limits.copy_gbs:.1f} GB/s, "
            f"{limits.flops / 1e9:.0f} GFLOP/s"
        )
    if compile_all_:
        broken += _compile_everything()
    return 1 if broken else 0


def _compile_everything() -> int:
    from elastickv.backends.cuda.variants import compile_all

    spilling = 0
    click.echo("kernel | architecture | parameters | registers | spills | shared bytes | seconds")
    for row in compile_all():
        click.echo(" | ".join(map(str, astuple(row))))
        sys.stdout.flush()
        spilling += row.spill_bytes > 0 and int(row.arch) >= 80
    return spilling
