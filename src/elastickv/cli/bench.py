"""`elastickv bench`, and the options that it shares with the original's entry point."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import click

# What `elastickv.bench` calls otherwise.
_SPELT = {"no_graphs": "graphs"}
_OF_STDOUT = ("output", "format_", "json_")

_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--model", help="Measure this model's tokens/s end to end: a folder, .gguf file, hub id, or shape:8b."),
    click.option("--calibration", type=click.Path(path_type=Path), help="With --model: file of `elastickv calibrate`."),
    click.option("--temperature", type=float, help="With --model: above 0 tokens are sampled.  [default: the likeliest]"),
    click.option("--seq", "--context", "seq", type=int, help="Context, tokens.  [default: 1024; 4096 with --model]"),
    click.option("--heads", type=int, help="Query heads.  [default: 16]"),
    click.option("--dim", type=int, help="Elements of a head.  [default: 64]"),
    click.option("--compress", type=float, help="Budget C: read at most 1/C of the dense KV bytes.  [default: 2]"),
    click.option("--reps", type=int, default=200, show_default=True, help="Samples of each contender."),
    click.option("--warmup", type=int, default=20, show_default=True, help="Samples thrown away before."),
    click.option("--inner-loops", type=int, default=64, show_default=True, help="Decode steps to a sample."),
    click.option(
        "--truncate", type=float, default=5.0, show_default=True, help="Percent of samples cut at either end for times."
    ),
    click.option("--paired-baseline", "paired", is_flag=True, help="Interleave dense and elastic in randomised ABBA blocks."),
    click.option("--inference", is_flag=True, help="Run the inference cycle too."),
    click.option("--decode-tokens", type=int, default=64, show_default=True, help="Tokens of the inference cycle."),
    click.option("--no-graphs", is_flag=True, help="Launch kernels one by one instead of a captured graph."),
    click.option("--batch", type=int, default=1, show_default=True, help="Sequences decoded together."),
    click.option("--kv-heads", type=int, help="KV heads.  [default: as many as query heads]"),
    click.option("--dtype", default="bf16", show_default=True, help="The model's own dtype: fp32, fp16 or bf16."),
    click.option("--dense", help="Dtype of our dense contender, so that runs to be compared share it.  [default: the fastest]"),
    click.option("--recipe", default="auto", show_default=True, help="auto, or a recipe text such as int8,stride=2."),
    click.option("--backend", default="auto", show_default=True, help="auto, cpu or cuda."),
    click.option("--device", type=int, help="Number of the CUDA device.  [default: 0]"),
    click.option("--sinks", type=int, help="Exact tokens at the start.  [default: 4]"),
    click.option("--window", type=int, help="Exact tokens at the end.  [default: 128]"),
    click.option("--anchor-every", type=int, help="Steps from one anchor to the next."),
    click.option("--layers", type=int, help="Caches of the inference cycle.  [default: enough to exceed the last-level cache]"),
    click.option(
        "--cache", default="cold", show_default=True, help="cold rotates copies past the last-level cache; hot repeats one."
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Seed of all random numbers."),
    click.option("--preset", help="long = 4096x32x128 C=4, short = 1024x16x64 C=2."),
    click.option(
        "--peers",
        is_flag=False,
        flag_value="all",
        help="Measure installed peers in the same run: all, or those whose names begin so (torch-sdpa,flashinfer-paged).",
    ),
    click.option("--time-limit", "time_limit_s", type=float, help="Stop measuring after this many seconds."),
    click.option("--until-ci", "until_ci_percent", type=float, help="Stop at this half-width of the interval, percent."),
    click.option("--output", type=click.Path(path_type=Path), help="Write the result here; the suffix tells the format."),
    click.option("--format", "format_", help="What stdout shows: table, json, jsonl, csv, md or html."),
    click.option("--json/--no-json", "json_", default=None, help="Short for --format json, --format table."),
    click.option(
        "--input", type=click.Path(path_type=Path), help="Safetensors file with q, k, v of real layers.  [default: shipped]"
    ),
    click.option("--gate", help="Verdict: golden, or bounds such as speedup>=1.5,cv<=5. Exit 0 pass, 1 fail, 3 inconclusive."),
)


def hyphenated(name: str) -> str:
    """Return an option's name as we spell it: the original wrote some with underscores."""
    return name.replace("_", "-")


def build_command(name: str, doc: str, default_format: str) -> click.Command:
    """Return the benchmark as a command whose stdout is `default_format` unless asked otherwise."""

    def callback(**given: Any) -> int:
        command = ("elastickv" if name == "bench" else name, *sys.argv[1:])
        return _run(given, default_format, command)

    callback.__doc__ = doc
    for option in reversed(_OPTIONS):
        callback = option(callback)
    settings = {"token_normalize_func": hyphenated, "help_option_names": ["-h", "--help"], "max_content_width": 110}
    return click.command(name, context_settings=settings)(callback)


def _run(given: dict[str, Any], default_format: str, command: tuple[str, ...]) -> int:
    from elastickv.api import bench
    from elastickv.benchmark.gate import EXIT_CODES
    from elastickv.cli.error_handling import interrupted
    from elastickv.cli.output import shown_after
    from elastickv.cli.progress import Bar
    from elastickv.results.files import check_writable
    from elastickv.results.measurement import check_format

    shown = _format(given, default_format)
    check_format(shown)
    output: Path | None = given["output"]
    if output is not None:
        check_writable(output)
    with Bar() as bar, _of_a_model() if given["model"] is not None else nullcontext():
        result = bench(**_typed(given), reporter=bar, command=command)
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


def _typed(given: dict[str, Any]) -> dict[str, Any]:
    """Return what was typed, under the names of `elastickv.bench`."""
    context = click.get_current_context()
    typed = {name for name in given if context.get_parameter_source(name) != click.core.ParameterSource.DEFAULT}
    asked = {name: given[name] for name in given if name in typed and name not in _OF_STDOUT}
    return {_SPELT.get(name, name): not value if name in _SPELT else value for name, value in asked.items()}


def _format(given: dict[str, Any], default_format: str) -> str:
    from elastickv.errors import UsageError

    if given["format_"] is not None:
        if given["json_"] is not None:
            raise UsageError(f"--format {given['format_']} and --json/--no-json both say what stdout shows: give one")
        return str(given["format_"])
    if given["json_"] is None:
        return default_format
    return "json" if given["json_"] else "table"


command = build_command("bench", "Measure decode attention at 1/C of the KV bytes against a dense baseline.", "table")
