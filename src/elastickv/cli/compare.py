"""`elastickv compare`."""

from inspect import signature
from pathlib import Path
from typing import Any

import click

from elastickv.results.compare.comparison import compare

_DEFAULTS = {name: parameter.default for name, parameter in signature(compare).parameters.items()}


@click.command("compare", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option(
    "--margin",
    type=float,
    default=_DEFAULTS["margin_percent"],
    show_default=True,
    help="Times within this many percent are the same.",
)
@click.option(
    "--fidelity-margin",
    type=float,
    default=_DEFAULTS["fidelity_margin_percent"],
    show_default=True,
    help="Recipe errors within this many percent are the same.",
)
@click.option(
    "--control",
    default=_DEFAULTS["control"],
    show_default=True,
    help="dense divides times by the dense times of the same run, which cancels drift; none compares them directly.",
)
@click.option("--allow-different-device", is_flag=True, help="Compare results of different devices too.")
@click.option("--fail-on", help="Gate on slower, fidelity or any: exit 1 for a regression, 3 if inconclusive.")
@click.option("--format", "format_", default="table", show_default=True, help="table, json, jsonl, csv, md or html.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Also write the comparison here; the suffix selects the format."
)
def command(**arguments: Any) -> int:
    """Say cell by cell whether B is as fast as A, and as faithful.

    A and B are results of `elastickv bench`, `run` or `baseline`, sweeps, folders of these, or results of the original
    program: A what was, B what is judged. SAME: the interval of B's time / A's lies within the margin; FASTER, SLOWER: beyond
    it; AMBIGUOUS: across its edge. A file that cannot be read is named and left out, and the exit code is 2.
    """
    from elastickv.cli.output import shown_after
    from elastickv.errors import UsageError, one_line
    from elastickv.results.compare.comparison import FAIL_ON
    from elastickv.results.compare.comparison_table import FORMATS
    from elastickv.results.files import check_writable

    shown, output, fail_on = arguments["format_"], arguments["output"], arguments["fail_on"]
    if fail_on not in (None, *FAIL_ON):
        raise UsageError(f"--fail-on {fail_on} is unknown: choose {', '.join(FAIL_ON)}")
    if shown not in FORMATS:
        raise UsageError(f"--format {shown} is unknown: choose {', '.join(FORMATS)}")
    if output is not None:
        check_writable(output)
    comparison = compare(
        arguments["a"],
        arguments["b"],
        margin_percent=arguments["margin"],
        fidelity_margin_percent=arguments["fidelity_margin"],
        control=arguments["control"],
        allow_different_device=arguments["allow_different_device"],
    )
    with shown_after(FORMATS[shown](comparison)):
        if output is not None:
            comparison.save(output)
    for reason in comparison.unreadable:
        click.echo(f"elastickv: error: {one_line(reason)}; it is left out", err=True)
    if shown in ("json", "jsonl", "csv"):
        for warning in comparison.warnings:
            if not warning.startswith("left out: "):
                click.echo(f"elastickv: warning: {one_line(warning)}", err=True)
    if fail_on is not None:
        click.echo(f"elastickv: --fail-on {fail_on}: {comparison.outcome(fail_on)}", err=True)
    return comparison.exit_code(fail_on)
