"""`elastickv run`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

PIECE_TOKENS = 32


@click.command("run", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option("--prompt", "-p", help="What to say to the model.")
@click.option("--file", "-f", "file", type=click.Path(path_type=Path), help="Read the prompt from this file.")
@click.option("--compress", type=float, help="Budget C: decodes read at most 1/C of the dense KV bytes.  [default: 4]")
@click.option("--recipe", help="Instead of --compress: a recipe's text such as int4,pages=1/4, or a file.")
@click.option("--calibration", type=click.Path(path_type=Path), help="File of `elastickv calibrate`.  [default: none, uniform]")
@click.option("--max-new-tokens", type=int, default=256, show_default=True, help="Tokens to generate at most.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random numbers.")
@click.option("--raw", is_flag=True, help="Give the prompt as it is, without the model's chat template.")
@click.option("--paired-baseline", "paired", is_flag=True, help="Generate with the stock cache too, taking turns.")
@click.option("--no-graphs", is_flag=True, help="Run decodes operation by operation instead of as captured CUDA graphs.")
@click.option("--dtype", help="Load the weights as fp32, fp16 or bf16.  [default: bf16 on cuda, fp32 on cpu]")
@click.option("--device", help="Where the model runs: cpu or cuda.  [default: cuda where there is one]")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the receipt here, as JSON.")
def command(**given: Any) -> int:
    """Generate text with MODEL through an elastic KV cache, and say what it took.

    MODEL is a local directory, a .gguf file or a hub id. The prompt comes from --prompt, --file or standard input; text goes to
    standard output, the receipt to standard error.
    """
    from elastickv.cli.progress import Bar
    from elastickv.cli.streaming import LiveText
    from elastickv.errors import UsageError
    from elastickv.results.files import check_writable, write_text
    from elastickv.results.formats import plain_json
    from elastickv.results.formats.generation_table import generation_table
    from elastickv.results.kinds.model_result import RunResult
    from elastickv.transformers.model_loading import NEEDED, load_model, require

    require(*NEEDED)
    text, output = _prompt(given["prompt"], given["file"]), given["output"]
    if given["max_new_tokens"] < 1:
        raise UsageError(f"--max-new-tokens={given['max_new_tokens']} is out of range: give a whole number from 1 up")
    if output is not None:
        check_writable(output)
    from elastickv.model_benchmark.generation import Sampling
    from elastickv.model_benchmark.run import PromptRun, Request
    from elastickv.model_benchmark.shapes import usual_device, usual_dtype
    from elastickv.recipe import ModelCalibration

    sampling = Sampling(given["temperature"], given["seed"])
    calibration = None if given["calibration"] is None else ModelCalibration.load(given["calibration"])
    compress = 4.0 if given["compress"] is None and given["recipe"] is None else given["compress"]
    device = given["device"] or usual_device()
    with Bar() as bar, quiet_transformers():
        bar.phase("loading")
        loaded = load_model(given["model"], given["dtype"] or usual_dtype(device), device)
        wanted = {"compress": compress, "recipe": given["recipe"], "calibration": calibration}
        wanted |= {"capture": not given["no_graphs"]}
        request = Request(text, not given["raw"], given["max_new_tokens"], sampling, wanted, given["paired"], PIECE_TOKENS)
        prepared = PromptRun(loaded, request)
        bar.phase("warming up")
        prepared.warm_up()
    with LiveText(loaded.tokenizer) as live, quiet_transformers():
        prepared.generate(live.heard)
    result = prepared.result(("elastickv", *sys.argv[1:]), live.text)
    click.echo(generation_table(RunResult.from_dict(result)), err=True, nl=False)
    if output is not None:
        write_text(output, plain_json.dumps(result))
    return 0


def _prompt(text: str | None, file: Path | None) -> str:
    """Return the prompt that was given in one of three ways."""
    from elastickv.errors import UsageError
    from elastickv.inputs import MAX_BYTES, decoded, read_text

    if text is not None and file is not None:
        raise UsageError("--prompt and --file are both given: give one")
    if file is not None:
        text = read_text(file, f"--file {file}", "give a text file in UTF-8")
    if text is None:
        if sys.stdin.isatty():
            raise UsageError("no prompt: give --prompt TEXT or --file FILE, or pipe a text in")
        # One byte more than is accepted tells that there is more.
        given = sys.stdin.buffer.read(MAX_BYTES + 1)
        if len(given) > MAX_BYTES:
            raise UsageError(f"the text on standard input is larger than {MAX_BYTES >> 20} MiB: give an excerpt")
        text = decoded(given, "standard input", "pipe a text in UTF-8 in")
    if not text.strip():
        raise UsageError("the prompt is empty: give --prompt TEXT or --file FILE, or pipe a text in")
    return text


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep Transformers' own notes off the terminal."""
    import transformers

    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
