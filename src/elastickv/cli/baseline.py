"""`elastickv baseline`: a small real model in Transformers or llama.cpp, as a reference."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from elastickv.benchmark.model_options import GgufBaselineOptions, TransformersBaselineOptions
from elastickv.cli.click_options import CALIBRATION, RECIPE, USUAL_DEVICE, USUAL_DTYPE, decorated, options_from

_FORMATS = ("table", "json")
_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
_OUTPUT = (
    click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the result here, as JSON."),
    click.option("--format", "format_", help="What stdout shows: table or json.  [default: table]"),
    click.option("--json", "json_", is_flag=True, help="The same as --format json."),
)


def _options(table: type, *others: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a decorator that adds the model, the options of a dataclass, and where the result goes."""
    options = (click.argument("model"), *options_from(table).values(), *others, *_OUTPUT)
    return lambda callback: decorated(callback, options)


@click.group("baseline", context_settings=_SETTINGS)
def command() -> None:
    """Measure a small real model as a reference: its speed with each KV cache, and what each does to its predictions."""


@command.command("transformers", context_settings=_SETTINGS)
@_options(
    TransformersBaselineOptions,
    RECIPE,
    CALIBRATION,
    USUAL_DTYPE,
    USUAL_DEVICE,
)
def with_transformers(**arguments: Any) -> int:
    """Generate with stock and elastic caches taking turns: `bench --model` at the size of a reference, and its quality cost.

    MODEL is a local directory, a .gguf file, a hub id, or shape:NAME: random weights, for speed and memory only.
    """
    from elastickv.cli.run import quiet_transformers
    from elastickv.transformers.model_loading import NEEDED, require

    _check(arguments)
    require(*NEEDED)
    from elastickv.model_benchmark.presets import transformers_baseline

    with quiet_transformers():
        return _measured(transformers_baseline, arguments)


@command.command("gguf", context_settings=_SETTINGS)
@_options(GgufBaselineOptions)
def with_llama(**arguments: Any) -> int:
    """Run llama.cpp with each of its KV cache types, taking turns, and show our formats' bytes beside theirs.

    MODEL is a .gguf file, or OWNER/NAME:FILE.gguf on the hub.
    """
    _check(arguments)
    from elastickv.model_benchmark.presets import gguf_baseline

    if arguments["kv_types"] is not None:
        arguments["kv_types"] = tuple(filter(None, map(str.strip, arguments["kv_types"].lower().split(","))))
    return _measured(gguf_baseline, arguments)


def _check(arguments: dict[str, Any]) -> None:
    """Refuse what can't be shown or written before anything is measured."""
    from elastickv.errors import UsageError
    from elastickv.results.files import check_writable

    shown = arguments.pop("format_") or ("json" if arguments["json_"] else "table")
    if shown not in _FORMATS:
        raise UsageError(f"--format {shown} is unknown: choose {', '.join(_FORMATS)}")
    arguments["json_"] = shown == "json"
    if arguments["output"] is not None:
        check_writable(arguments["output"])


def _measured(baseline: Callable[..., dict[str, Any]], arguments: dict[str, Any]) -> int:
    from elastickv.cli.output import shown_after
    from elastickv.cli.progress import Bar
    from elastickv.results.files import write_text
    from elastickv.results.formats import plain_json
    from elastickv.results.measurement import Measurement

    output, as_json = arguments.pop("output"), arguments.pop("json_")
    inputs = {name: value for name, value in arguments.items() if value is not None}
    with Bar() as bar:
        result = baseline(**inputs, command=("elastickv", *sys.argv[1:]), progress=bar)
    written = plain_json.dumps(result)
    with shown_after(written if as_json else Measurement(result).shown("table")):
        if output is not None:
            write_text(output, written)
    return 0
