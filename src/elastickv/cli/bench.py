"""`elastickv bench`, and the options that it shares with the original's entry point."""

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import click

from elastickv.benchmark.model_options import ModelOptions
from elastickv.benchmark.options import PRESETS, Options, defaults_of
from elastickv.cli.click_options import decorated, hyphenated, options_from

_OUTPUT = ("output", "format_", "json_")


def _notes() -> dict[str, str]:
    """Return notes on the defaults that differ when a model is measured."""
    step = defaults_of(Options)
    named = {"dtype": "fp32 on cpu"}
    model = {
        name: named.get(name) or f"{default:g}" for name, default in defaults_of(ModelOptions).items() if default != step[name]
    }
    return {name: f"{default} with --model" for name, default in model.items()}


def _presets() -> str:
    """Return what the presets stand for: context x heads x head_dim, and C."""
    return ", ".join("{} = {seq}x{heads}x{dim} C={compress}".format(name, **values) for name, values in PRESETS.items()) + "."


def _options(notes: dict[str, str]) -> tuple[Any, ...]:
    """Return the options of the command, with notes on the defaults of some."""
    return (
        click.option("--model", help="Measure this model's tokens/s end to end: a folder, .gguf file, hub id, or shape:NAME."),
        click.option("--calibration", type=click.Path(path_type=Path), help="With --model: file of `elastickv calibrate`."),
        click.option("--temperature", type=float, help="With --model: above 0 tokens are sampled.  [default: the likeliest]"),
        click.option("--preset", help=_presets()),
        *options_from(Options, notes).values(),
        click.option("--output", type=click.Path(path_type=Path), help="Write the result here; the suffix selects the format."),
        click.option("--format", "format_", help="What stdout shows: table, json, jsonl, csv, md or html."),
        click.option("--json/--no-json", "json_", default=None, help="Short for --format json, --format table."),
        click.option(
            "--gate", help="Verdict: golden, or bounds such as speedup>=1.5,cv<=5. Exit 0 pass, 1 fail, 3 inconclusive."
        ),
    )


def build_command(name: str, doc: str, default_format: str, time_limit_s: float | None = None) -> click.Command:
    """Return the benchmark as a command whose stdout is `default_format` and whose time limit `time_limit_s` by default."""

    def callback(**arguments: Any) -> int:
        command = ("elastickv" if name == "bench" else name, *sys.argv[1:])
        if arguments["time_limit_s"] is None and arguments["model"] is None:
            arguments["time_limit_s"] = time_limit_s
        return _run(arguments, default_format, command)

    callback.__doc__ = doc
    notes = _notes() | ({} if time_limit_s is None else {"time_limit_s": f"{time_limit_s:g}"})
    callback = decorated(callback, _options(notes))
    settings = {"token_normalize_func": hyphenated, "help_option_names": ["-h", "--help"], "max_content_width": 110}
    return click.command(name, context_settings=settings)(callback)


def _run(arguments: dict[str, Any], default_format: str, command: tuple[str, ...]) -> int:
    started = time.monotonic()
    from elastickv.api import bench
    from elastickv.benchmark.gate import EXIT_CODES
    from elastickv.cli.error_handling import interrupted
    from elastickv.cli.output import shown_after
    from elastickv.cli.progress import Bar
    from elastickv.results.files import check_writable
    from elastickv.results.measurement import check_format

    shown = _format(arguments, default_format)
    check_format(shown)
    output: Path | None = arguments["output"]
    if output is not None:
        check_writable(output)
    inputs = {name: value for name, value in arguments.items() if name not in _OUTPUT}
    with Bar() as bar, _of_a_model() if arguments["model"] is not None else nullcontext():
        result = bench(**inputs, reporter=bar, command=command, started=started)
    with shown_after(result.shown(shown)):
        if output is not None:
            result.save(output)
    if not result.complete:
        return interrupted()
    return EXIT_CODES[result.outcome] if result.outcome else 0


def _of_a_model() -> AbstractContextManager[None]:
    from elastickv.cli.run import quiet_transformers
    from elastickv.transformers.model_loading import NEEDED, require

    require(*NEEDED)
    return quiet_transformers()


def _format(arguments: dict[str, Any], default_format: str) -> str:
    from elastickv.errors import UsageError

    if arguments["format_"] is not None:
        if arguments["json_"] is not None:
            raise UsageError(f"--format {arguments['format_']} and --json/--no-json both say what stdout shows: give one")
        return str(arguments["format_"])
    if arguments["json_"] is None:
        return default_format
    return "json" if arguments["json_"] else "table"


command = build_command("bench", "Measure decode attention at 1/C of the KV bytes against a dense baseline.", "table")
