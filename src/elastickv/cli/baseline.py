"""`elastickv baseline`: a small real model in Transformers or llama.cpp, as a reference."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_FORMATS = ("table", "json")
_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
_SHARED = (
    click.argument("model"),
    click.option("--context", "--seq", type=int, default=512, show_default=True, help="Tokens of the prompt."),
    click.option("--reps", type=int, default=6, show_default=True, help="Samples of each cache."),
    click.option("--decode-tokens", type=int, default=16, show_default=True, help="Decodes of a sample."),
    click.option("--scored", type=int, default=16, show_default=True, help="Predictions whose loss is measured; 0: none."),
    click.option("--seed", type=int, default=0, show_default=True, help="Seed of the order."),
    click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the result here, as JSON."),
    click.option("--format", "format_", help="What stdout shows: table or json.  [default: table]"),
    click.option("--json", "json_", is_flag=True, help="The same as --format json."),
)


def _shared(callback: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_SHARED):
        callback = option(callback)
    return callback


@click.group("baseline", context_settings=_SETTINGS)
def command() -> None:
    """Measure a small real model as a reference: its speed with each KV cache, and what each does to its predictions."""


@command.command("transformers", context_settings=_SETTINGS)
@_shared
@click.option("--compress", type=float, help="Budget C: decodes read at most 1/C of the dense KV bytes.  [default: 2]")
@click.option("--recipe", help="Instead of --compress: a recipe's text such as int4,pages=1/4, or a file.")
@click.option("--calibration", type=click.Path(path_type=Path), help="File of `elastickv calibrate`.  [default: none, uniform]")
@click.option("--dtype", help="Load the weights as fp32, fp16 or bf16.  [default: bf16 on cuda, fp32 on cpu]")
@click.option("--device", help="Where the model runs: cpu or cuda.  [default: cuda where there is one]")
def with_transformers(**given: Any) -> int:
    """Generate with stock and elastic caches in turns: `bench --model` at the size of a reference, and its price.

    MODEL is a local directory, a .gguf file, a hub id, or a shape with random weights such as shape:tiny.
    """
    from elastickv.cli.run import quiet_transformers
    from elastickv.transformers.model_loading import NEEDED, require

    _check(given)
    require(*NEEDED)
    from elastickv.model_benchmark.presets import transformers_baseline

    with quiet_transformers():
        return _measured(transformers_baseline, given)


@command.command("gguf", context_settings=_SETTINGS)
@_shared
@click.option("--kv-types", default="f16,q8_0,q4_0", show_default=True, help="KV cache types; the first is the reference.")
@click.option("--threads", type=int, help="Threads of the CPU.  [default: all]")
def with_llama(**given: Any) -> int:
    """Run llama.cpp with each of its KV cache types in turns, and show our formats' bytes beside theirs.

    MODEL is a .gguf file, or OWNER/NAME:FILE.gguf on the hub.
    """
    _check(given)
    from elastickv.model_benchmark.presets import gguf_baseline

    given["kv_types"] = tuple(filter(None, map(str.strip, given["kv_types"].lower().split(","))))
    return _measured(gguf_baseline, given)


def _check(given: dict[str, Any]) -> None:
    """Refuse what can't be shown or written before anything is measured."""
    from elastickv.errors import UsageError
    from elastickv.results.files import check_writable

    shown = given.pop("format_") or ("json" if given["json_"] else "table")
    if shown not in _FORMATS:
        raise UsageError(f"--format {shown} is unknown: choose {', '.join(_FORMATS)}")
    given["json_"] = shown == "json"
    if given["output"] is not None:
        check_writable(given["output"])


def _measured(baseline: Callable[..., dict[str, Any]], given: dict[str, Any]) -> int:
    from elastickv.cli.progress import Bar
    from elastickv.results.files import write_text
    from elastickv.results.formats import plain_json
    from elastickv.results.measurement import Measurement

    output, as_json = given.pop("output"), given.pop("json_")
    with Bar() as bar:
        result = baseline(**given, command=("elastickv", *sys.argv[1:]), progress=bar)
    written = plain_json.dumps(result)
    if output is not None:
        write_text(output, written)
    click.echo(written if as_json else Measurement(result).shown("table"), nl=False)
    return 0
