"""`elastickv run`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elastickv.benchmark.model_options import GenerationOptions, requested_compress
from elastickv.benchmark.options import defaults_of
from elastickv.cli.click_options import CALIBRATION, RECIPE, USUAL_DEVICE, USUAL_DTYPE, UnicodeText, options_from

if TYPE_CHECKING:
    from elastickv.model_benchmark.model_source import ModelSource
    from elastickv.model_benchmark.run import PromptRun, Request

PIECE_TOKENS = 32
_OPTIONS = options_from(GenerationOptions)


@click.command("run", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option("--prompt", "-p", type=UnicodeText(), help="What to say to the model.")
@click.option("--file", "-f", "file", type=click.Path(path_type=Path), help="Read the prompt from this file.")
@_OPTIONS["compress"]
@RECIPE
@CALIBRATION
@_OPTIONS["max_new_tokens"]
@_OPTIONS["temperature"]
@_OPTIONS["seed"]
@click.option("--raw", is_flag=True, help="Give the prompt as it is, without the model's chat template.")
@click.option("--paired-baseline", "paired", is_flag=True, help="Generate with the stock cache too, taking turns.")
@click.option("--no-graphs", is_flag=True, help="Run decodes operation by operation instead of as captured CUDA graphs.")
@USUAL_DTYPE
@USUAL_DEVICE
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the statistics here, as JSON.")
def command(**arguments: Any) -> int:
    """Generate text with MODEL through an elastic KV cache, and show its speed and memory.

    MODEL is a local directory, a .gguf file, a hub id, or shape:NAME: random weights, for speed and memory only. The prompt
    comes from --prompt, --file or standard input; text goes to standard output, its statistics to standard error.
    """
    from elastickv.cli.progress import Bar
    from elastickv.cli.streaming import LiveText
    from elastickv.errors import UsageError
    from elastickv.results.files import check_writable, write_text
    from elastickv.results.formats import plain_json
    from elastickv.results.formats.generation_table import generation_table
    from elastickv.results.kinds.model_result import RunResult
    from elastickv.transformers.model_loading import NEEDED, check_device, require

    require(*NEEDED)
    text, output = _prompt(arguments["prompt"], arguments["file"]), arguments["output"]
    names = defaults_of(GenerationOptions)
    options = GenerationOptions(**{name: arguments[name] for name in names if arguments[name] is not None})
    if options.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens={options.max_new_tokens} is out of range: give a whole number from 1 up")
    if output is not None:
        check_writable(output)
    with Bar() as bar:
        bar.phase("importing PyTorch and Transformers")
        from elastickv.evaluation.layer_progress import layer_progress
        from elastickv.model_benchmark.generation import Sampling
        from elastickv.model_benchmark.model_source import open_model
        from elastickv.model_benchmark.run import PromptRun, Request
        from elastickv.model_benchmark.shapes import usual_device, usual_dtype
        from elastickv.recipe import DTYPES, ModelCalibration

    sampling = Sampling(options.temperature, options.seed)
    calibration = None if arguments["calibration"] is None else ModelCalibration.load(arguments["calibration"])
    compress = requested_compress(arguments["compress"], arguments["recipe"], options.compress)
    device = arguments["device"] or usual_device()
    check_device(device)
    dtype = arguments["dtype"] or usual_dtype(device)
    if dtype not in DTYPES:
        raise UsageError(f"--dtype={dtype} is unknown: choose {', '.join(DTYPES)}")
    cache = {"compress": compress, "recipe": arguments["recipe"], "calibration": calibration}
    cache |= {"capture": not arguments["no_graphs"]}
    request = Request(text, not arguments["raw"], options.max_new_tokens, sampling, cache, arguments["paired"], PIECE_TOKENS)
    with Bar() as bar, quiet_transformers():
        bar.phase("reading the configuration")
        source = open_model(arguments["model"])
        prepared = PromptRun(source, request, dtype)
        for line in _before_loading(prepared, source, request):
            click.echo(f"elastickv: {line}", err=True)
        bar.phase("loading")
        loaded = prepared.load(device, bar.progress)
        bar.phase("warming up")
        prepared.warm_up()
    live = LiveText(source.tokenizer, keep_going=output is not None)
    with live, quiet_transformers(), layer_progress(loaded.model, live.reading):
        prepared.generate(live.add)
    result = prepared.result(("elastickv", *sys.argv[1:]), live.text)
    try:
        if output is not None:
            write_text(output, plain_json.dumps(result))
    finally:
        click.echo(generation_table(RunResult.from_dict(result)), err=True, nl=False)
    if live.error is not None:
        raise live.error
    return 0


def _before_loading(prepared: "PromptRun", source: "ModelSource", request: "Request") -> Iterator[str]:
    """Yield what is known of a request before the weights are loaded."""
    from elastickv.model_benchmark.model_source import RandomWeights
    from elastickv.results.formats.generation_table import compression_sentence

    if isinstance(source, RandomWeights):
        yield f"{source.name} has random weights: speed and memory are those of the model, the text is noise"
    if prepared.starts is not None:
        sentence = compression_sentence(prepared.starts, request.wanted["compress"])
        yield f"{sentence}; this run has at most {prepared.prompt_tokens + request.tokens}"


def _prompt(text: str | None, file: Path | None) -> str:
    """Return the prompt: from --prompt, --file or standard input."""
    from elastickv.errors import UsageError
    from elastickv.inputs import MAX_BYTES, decoded, read_text

    if text is not None and file is not None:
        raise UsageError("--prompt and --file are both given: give one")
    if file is not None:
        text = read_text(file, f"--file {file}", "give a text file in UTF-8")
    if text is None:
        if sys.stdin.isatty():
            raise UsageError("no prompt: give --prompt TEXT or --file FILE, or pipe a text in")
        # One byte more than is accepted shows that there is more.
        data = sys.stdin.buffer.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UsageError(f"the text on standard input is larger than {MAX_BYTES >> 20} MiB: give an excerpt")
        text = decoded(data, "standard input", "pipe a text in UTF-8 in")
    if not text.strip():
        raise UsageError("the prompt is empty: give --prompt TEXT or --file FILE, or pipe a text in")
    return text


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence Transformers' own messages."""
    import transformers

    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
