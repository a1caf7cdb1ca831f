"""`elastickv sweep`: the options of `bench`, as lists and ranges."""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elastickv.benchmark.options import AXES, SETTINGS, Options
from elastickv.cli.click_options import decorated, hyphenated, options_from
from elastickv.cli.flags import with_flags
from elastickv.cli.progress import Bar
from elastickv.errors import one_line

if TYPE_CHECKING:
    from elastickv.sweeps.sweep_result import Sweep

FORMATS = ("md", "csv", "json", "none")
_BENCH = options_from(Options, several=AXES)
_OPTIONS = (
    *(_BENCH[name] for name in (*AXES, *SETTINGS)),
    click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The sweep's file, .jsonl."),
    click.option("--retry-failed", is_flag=True, help="With --resume: measure the failed cells again."),
    click.option("--resume", is_flag=True, help="Continue the sweep in --output, if there is one."),
    click.option("--plan", type=click.Path(path_type=Path), help="TOML or JSON file of axes and settings."),
    click.option("--preset", help="smoke: a minute's worth on a CPU."),
    click.option("--baseline", help="Add `elastickv baseline` as cells: transformers,gguf; needs --model."),
    click.option("--model", multiple=True, help="Model of the baselines: a path or a hub id; may be repeated."),
    click.option("--devices", help="CUDA devices, one process each: 0,1,2-7."),
    click.option("--time-limit", "time_limit_s", type=float, help="Stop after this many seconds; --resume continues."),
    click.option(
        "--export", "exports", multiple=True, type=click.Path(path_type=Path), help="Write .csv, .md, .json or .parquet too."
    ),
    click.option("--format", "format_", default="md", show_default=True, help="What stdout shows: md, csv, json or none."),
)


class Cells(Bar):
    """Shows the cells of a sweep and the time left; without a terminal, one line per cell."""

    def begin(self, done: int, total: int) -> None:
        """`done` of `total` cells are in the file already."""
        self._before, self._done, self._total, self._start = done, done, total, time.monotonic()
        self._left.begin(done)
        self._progress.reset(self._task, completed=done, total=total)

    def working(self, cell: dict[str, Any], phase: str, share: float) -> None:
        """Show the phase and the progress of a cell."""
        from elastickv.sweeps.plan import name

        said = f"{name(cell)}: {phase} {share:.0%}" if share else f"{name(cell)}: {phase}"
        self._progress.update(self._task, description=said, completed=self._done, total=self._total)
        if self._due():
            self._line(f"{self._done} of {self._total}, {self._left}: {said}")

    def finished(self, cell: dict[str, Any], status: str, reason: str | None) -> None:
        """Count a cell."""
        from elastickv.sweeps.plan import name

        self._done += 1
        self._left.update(self._done, self._total)
        self._progress.update(self._task, completed=self._done, total=self._total)
        seconds = (time.monotonic() - self._start) / (self._done - self._before) * (self._total - self._done)
        if self._progress.disable or status != "ok" or reason:
            said = f"{status}: {with_flags(reason, command)}" if reason else status
            self._progress.console.print(
                f"elastickv: {self._done} of {self._total}, {seconds:.0f} s left: {name(cell)}: {said}",
                markup=False,
                soft_wrap=True,
            )

    def left_out(self, device: int | None, reason: str) -> None:
        """Show that a device measures no more cells."""
        which = "a process" if device is None else f"device {device}"
        said = f"elastickv: warning: {which} is left out: {with_flags(reason, command)}"
        self._progress.console.print(said, markup=False, soft_wrap=True)


@click.command(
    "sweep",
    context_settings={"token_normalize_func": hyphenated, "help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@lambda callback: decorated(callback, _OPTIONS)
def command(**arguments: Any) -> int:
    """Measure every combination of --seq, --batch, --compress, --recipe and more, each in turns with dense.

    Each of them takes lists and ranges: 1024,4096 or 2-8*2 or 1-9+4. Recipes that hold commas are separated by semicolons.
    """
    from elastickv.cli.error_handling import interrupted
    from elastickv.cli.output import shown_after
    from elastickv.errors import UsageError
    from elastickv.results.files import check_writable
    from elastickv.sweeps.axes import values
    from elastickv.sweeps.sweep import sweep
    from elastickv.sweeps.sweep_result import Sweep, check_export

    shown, exports, devices = arguments.pop("format_"), arguments.pop("exports"), arguments.pop("devices")
    output: Path = arguments.pop("output")
    if shown not in FORMATS:
        raise UsageError(f"--format {shown} is unknown: choose {', '.join(FORMATS)}")
    for path in exports:
        check_export(path)
        check_writable(path)
    own = {name: arguments.pop(name) for name in ("plan", "preset", "resume", "retry_failed", "time_limit_s")}
    arguments["model"] = list(arguments["model"]) or None
    requested = {name: value for name, value in arguments.items() if value is not None}
    if devices is not None:
        own["devices"] = values("device", devices)
    try:
        cells = Cells()
        with cells:
            result = sweep(output=output, watcher=cells, command=("elastickv", *sys.argv[1:]), **own, **requested)
    except KeyboardInterrupt:
        click.echo(f"elastickv: interrupted: --resume goes on with {output}", err=True)
        with suppress(UsageError):  # a file without a whole header
            _say_missing(Sweep.load(output), output)
        return interrupted()
    _say_missing(result, output)
    if result.cells:
        tables: dict[str, Callable[[], str]] = {
            "md": result.to_markdown,
            "csv": result.to_csv,
            "json": result.to_json,
            "none": str,
        }
        with shown_after(tables[shown]()):
            for path in exports:
                result.save(path)
    return 0


def _say_missing(result: "Sweep", output: Path) -> None:
    if not result.complete:
        click.echo(f"elastickv: {one_line(result.missing.sentence(str(output)))}: --resume goes on", err=True)
