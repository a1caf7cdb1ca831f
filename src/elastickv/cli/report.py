"""`elastickv report`."""

from pathlib import Path
from typing import Any

import click

from elastickv.cli.click_options import UnicodeText

_NAMES = {"html": "report.html", "md": "report.md", "pdf-ready": "report.html", "png": "report.png"}


@click.command("report", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The page.  [default: report.html, .md or .png here]")
@click.option(
    "--format",
    "format_",
    help="html: one page that needs no network. md: tables, its figures as SVG in a folder beside it. pdf-ready: the page laid "
    "out for paper, light, everything open, to be printed as PDF. png: one picture of the headline and the first charts.  "
    "[default: what the suffix of --output says]",
)
@click.option("--title", type=UnicodeText(), help="Title of the page.  [default: the device]")
def command(**arguments: Any) -> int:
    """Make one page of results: what is worth it on this device, and its cost.

    FILES are results of `elastickv bench`, `bench --model`, `run`, `eval` and `baseline`, of `benchmarks/serving.py`, sweeps,
    results of the original program, or folders of these. A file that cannot be read or is no result is named and left out, and
    the exit code is 2.
    """
    from elastickv.cli.error_handling import BAD_INPUT
    from elastickv.cli.progress import Bar
    from elastickv.errors import one_line
    from elastickv.html_report.report import check_installed, chosen_format, made_of
    from elastickv.results.files import check_writable

    wanted, output = arguments["format_"], arguments["output"]
    check_installed()
    shown = chosen_format(output or Path(_NAMES.get(wanted or "html", "report.html")), wanted)
    output = output or Path(_NAMES[shown])
    check_writable(output)
    with Bar(short=True) as bar:
        bar.phase("reading the results")
        made = made_of(arguments["files"], arguments["title"])
        bar.phase("drawing the page")
        made.save(output, shown, bar.progress)
    for reason in made.facts.unreadable:
        click.echo(f"elastickv: error: {one_line(reason)}; it is left out", err=True)
    for note in (*made.facts.incomplete, *made.facts.notes):
        click.echo(f"elastickv: warning: {one_line(note)}", err=True)
    click.echo(one_line(f"{output}: {made.content.headline.sentence}"))
    return BAD_INPUT if made.facts.unreadable else 0
