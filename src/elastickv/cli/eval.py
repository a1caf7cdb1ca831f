"""`elastickv eval`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elastickv.cli.click_options import CALIBRATION
from elastickv.evaluation.evaluation_options import EvaluationOptions
from elastickv.evaluation.generations.continuation_options import ContinuationOptions
from elastickv.evaluation.serving.engine_options import ENGINES

if TYPE_CHECKING:
    from elastickv.evaluation.texts import Text
    from elastickv.recipe import ModelCalibration

_REFERENCES = ("stock-quantized",)
_DEFAULTS = EvaluationOptions()
_GENERATION = ContinuationOptions()


def _listed(numbers: tuple[float, ...]) -> str:
    return ",".join(f"{number:g}" for number in numbers)


@click.command("eval", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option("--compress", default=_listed(_DEFAULTS.ratios), show_default=True, help="Values of C; none: no.")
@click.option(
    "--formats",
    multiple=True,
    help="KV formats: all, names with commas between, one recipe or a file, reference:RECIPE; may be repeated.",
)
@click.option(
    "--exact-tokens",
    default="own",
    show_default=True,
    help="Sinks and window of all --formats, as in 4+128; own: each its own.",
)
@click.option(
    "--stored-bits", help="Bits an element, as 4.75: the calibration chooses formats by layer; commas between several."
)
@click.option("--selections", help="Published selections at each C: all, or names with commas between.")
@click.option("--text", "texts", multiple=True, type=click.Path(path_type=Path), help="Text to score; may be repeated.")
@CALIBRATION
@click.option(
    "--context", "contexts", default=_listed(_DEFAULTS.contexts), show_default=True, help="Tokens of a window; none: no."
)
@click.option("--windows", type=int, default=_DEFAULTS.window_count, show_default=True, help="Windows of each context.")
@click.option(
    "--scored", type=int, default=_DEFAULTS.scored, show_default=True, help="Last tokens of each window that are scored."
)
@click.option(
    "--needle",
    default=_listed(_DEFAULTS.needle_lengths),
    show_default=True,
    help="Tokens of the prompts that hide a pass key; none: no.",
)
@click.option(
    "--depths", type=int, default=_DEFAULTS.needle_depths, show_default=True, help="Depths of the pass key at each length."
)
@click.option(
    "--greedy",
    type=int,
    default=_DEFAULTS.greedy_tokens,
    show_default=True,
    help="Tokens decoded greedily after each window; 0: none.",
)
@click.option(
    "--generate",
    type=int,
    default=_GENERATION.tokens,
    show_default=True,
    help="Tokens of long texts after each window, one greedy, others sampled; 0: none.",
)
@click.option(
    "--samples", type=int, default=_GENERATION.samples, show_default=True, help="Texts that --generate samples a window."
)
@click.option("--temperature", type=float, default=_GENERATION.temperature, show_default=True, help="Of the samples; above 0.")
@click.option(
    "--top-p", type=float, default=_GENERATION.top_p, show_default=True, help="Probability that samples are taken from."
)
@click.option("--seed", type=int, default=_GENERATION.seed, show_default=True, help="Of the samples' random numbers.")
@click.option("--tasks", help="RULER's synthetic tasks and others: all, or names with commas between.")
@click.option(
    "--task-lengths",
    default=_listed(_DEFAULTS.task_lengths),
    show_default=True,
    help="Tokens of prompt and answer of the --tasks.",
)
@click.option("--task-items", type=int, default=_DEFAULTS.task_items, show_default=True, help="Items of each task and length.")
@click.option(
    "--task-batch", type=int, default=_DEFAULTS.task_batch, show_default=True, help="Items that are decoded together."
)
@click.option(
    "--dataset",
    "datasets",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Questions to answer: a line of JSON with context, question and answers each; may be repeated.",
)
@click.option("--tolerance", help="Suggest the largest C within ppl=0.5%, kl=0.01 or top1=96%.")
@click.option("--reference", help="Measure too: stock-quantized, Transformers' own quantized cache.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the result here: .json, or .md for the tables.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the figures into this .png, .svg or .pdf.")
@click.option("--engine", default=ENGINES[0], show_default=True, help="What decodes: transformers, or vllm with our backend.")
@click.option("--engine-options", help="Arguments of vLLM's LLM, as a JSON object.")
@click.option(
    "--dtype",
    help="Load the model's weights as fp32, fp16 or bf16.  [default: fp32; with vLLM on GPUs the model's own 16 bits, or bf16]",
)
@click.option("--device", help="Where the model runs: cpu or cuda.  [default: cpu; with vLLM where that runs]")
def command(**arguments: Any) -> int:
    """Measure what MODEL's predictions lose at each C, through the decode path that `generate` takes, and with other methods.

    MODEL is a local directory, a .gguf file or a hub id; shape:NAME has random weights and no quality to measure. Without
    --text two texts are scored that the package ships. With --engine vllm the same is measured through vLLM.
    """
    from elastickv.cli.error_handling import interrupted
    from elastickv.cli.output import shown_after
    from elastickv.errors import PartialResult, UsageError
    from elastickv.recipe import ModelCalibration
    from elastickv.results.files import check_writable, write_text
    from elastickv.results.formats import plain_json
    from elastickv.results.formats.fidelity_table import fidelity_tables
    from elastickv.results.kinds.evaluation_result import EvaluationResult
    from elastickv.transformers.model_loading import NEEDED, require

    require(*NEEDED)
    if arguments["engine"] not in ENGINES:
        raise UsageError(f"`engine={arguments['engine']}` is unknown: choose {', '.join(ENGINES)}")
    if arguments["reference"] not in (None, *_REFERENCES):
        raise UsageError(f"--reference={arguments['reference']} is unknown: choose {', '.join(_REFERENCES)}")
    output, plot = arguments["output"], arguments["plot"]
    if plot is not None:
        from elastickv.results.formats.fidelity_plot import check_plot

        check_plot(plot)
    for target in (output, plot):
        if target is not None:
            check_writable(target)
    calibration = None if arguments["calibration"] is None else ModelCalibration.load(arguments["calibration"])
    measure = _through_vllm if arguments["engine"] == "vllm" else _in_transformers
    failure: Exception | None = None
    try:
        result = measure(arguments, calibration)
    except PartialResult as partial:
        result, failure = partial.result, partial.error
    result |= {"command": ["elastickv", *sys.argv[1:]]}
    measured = EvaluationResult.from_dict(result)
    with shown_after(fidelity_tables(measured)):
        if output is not None:
            write_text(output, fidelity_tables(measured) if output.suffix.lower() == ".md" else plain_json.dumps(result))
        if plot is not None:
            from elastickv.results.formats.fidelity_plot import draw

            draw(measured, plot)
    if failure is not None:
        raise failure
    return 0 if result["complete"] else interrupted()


def _in_transformers(arguments: dict[str, Any], calibration: "ModelCalibration | None") -> dict[str, Any]:
    """Evaluate with a model of Transformers in this process."""
    from elastickv.cli.progress import Bar
    from elastickv.errors import UsageError
    from elastickv.transformers.model_loading import load_model

    if arguments["engine_options"] is not None:
        raise UsageError("`engine_options` are vLLM's: give `engine=vllm`, or leave them out")
    with Bar() as bar:
        bar.phase("importing PyTorch and Transformers")
        from elastickv.evaluation.evaluate import evaluate
        from elastickv.evaluation.format_paths import check_budgets
        from elastickv.evaluation.kv_formats.published_formats import parse_formats
        from elastickv.evaluation.kv_selections.published_selections import parse_selections
        from elastickv.evaluation.loading_progress import loading_progress
        from elastickv.evaluation.tasks.question_file import read_questions

    options = _options(arguments, parse_formats(arguments["formats"]), parse_selections(arguments["selections"]))
    for path in arguments["datasets"]:
        read_questions(path)  # a file that cannot be measured is refused before a model is loaded
    check_budgets(options.stored_bits, calibration, arguments["model"])
    if options.stored_bits and calibration is not None and calibration.sensitivity is None:
        click.echo(_insensitive(arguments["model"]), err=True)
    texts = _texts(arguments, calibration)
    with Bar() as bar:
        bar.phase("loading")
        with loading_progress(bar.progress):
            loaded = load_model(arguments["model"], arguments["dtype"] or "fp32", arguments["device"] or "cpu")
        _warn(arguments["model"], options, calibration, loaded.tokenizer)
        return evaluate(loaded, texts, options, calibration, bar)


def _through_vllm(arguments: dict[str, Any], calibration: "ModelCalibration | None") -> dict[str, Any]:
    """Evaluate with engines of vLLM, in processes of their own."""
    from elastickv.cli.progress import Bar
    from elastickv.errors import UsageError
    from elastickv.evaluation.serving.engine_options import (
        EngineOptions,
        device_of,
        installed_engine,
        parse_page_formats,
        served_options,
    )

    options = _options(arguments, parse_page_formats(arguments["formats"]), arguments["selections"] or ())
    served_options(options)
    engine_options, device = EngineOptions.parse(arguments["engine_options"]), device_of(installed_engine())
    if arguments["device"] not in (None, device):
        raise UsageError(f"`device={arguments['device']}`: the installed vLLM serves on {device}: leave the option out")
    with Bar() as bar:
        bar.phase("importing PyTorch and Transformers")
        from elastickv.evaluation.serving.evaluate_served import evaluate_served
        from elastickv.evaluation.serving.served_checkpoint import ServedCheckpoint

        texts = _texts(arguments, calibration)
        model = ServedCheckpoint(arguments["model"], arguments["dtype"], device, engine_options, arguments["calibration"])
        _warn(arguments["model"], options, calibration, model.checkpoint.tokenizer)
        return evaluate_served(model, texts, options, calibration, bar)


def _texts(arguments: dict[str, Any], calibration: "ModelCalibration | None") -> "list[Text]":
    from elastickv.evaluation.texts import evaluation_texts, read_text

    texts = [read_text(path) for path in arguments["texts"]] or evaluation_texts()
    if calibration is not None and calibration.text in {text.name for text in texts}:
        click.echo(f"elastickv: warning: {calibration.text} was calibrated on and is scored too", err=True)
    return texts


def _warn(model: str, options: EvaluationOptions, calibration: "ModelCalibration | None", tokenizer: Any) -> None:
    """Warn of a calibration that is missing, or read its text otherwise."""
    from elastickv.transformers.tokenization import text_prefix

    if calibration is None and options.ratios:
        click.echo(_uncalibrated(model), err=True)
    elif calibration is not None and (calibration.prefix or ()) != text_prefix(tokenizer):
        click.echo(_begun_otherwise(model), err=True)


def _uncalibrated(model: str) -> str:
    return (
        "elastickv: warning: no --calibration: every head reads the same share of its pages, and the loss is several times "
        f"larger than it needs to be; elastickv calibrate {model}"
    )


def _insensitive(model: str) -> str:
    return (
        "elastickv: warning: the calibration has no sensitivities of layers, and stored bits go to the layers of large errors "
        f"instead of those that matter; a float32 model has them: elastickv calibrate {model} --dtype fp32, and evaluate so too"
    )


def _begun_otherwise(model: str) -> str:
    return (
        "elastickv: warning: the calibration read its text without the special tokens that the tokenizer begins with, and its "
        f"errors are not those of this evaluation: elastickv calibrate {model}"
    )


def _options(arguments: dict[str, Any], formats: tuple[str, ...], selections: tuple[str, ...]) -> EvaluationOptions:
    from elastickv.errors import UsageError
    from elastickv.evaluation.exact_tokens import ExactTokens
    from elastickv.evaluation.suggestion import Tolerance
    from elastickv.evaluation.tasks.task_registry import parse_tasks

    for name, least in (("windows", 1), ("scored", 1), ("depths", 1), ("greedy", 0), ("task_items", 1), ("task_batch", 1)):
        if arguments[name] < least:
            raise UsageError(
                f"--{name.replace('_', '-')}={arguments[name]} is out of range: give a whole number from {least} up"
            )
    none = ("none", "")
    lengths = () if arguments["needle"].strip() in none else _numbers("needle", arguments["needle"], int)
    return EvaluationOptions(
        ratios=() if arguments["compress"].strip() == "none" else _numbers("compress", arguments["compress"], float),
        contexts=() if arguments["contexts"].strip() in none else _numbers("context", arguments["contexts"], int),
        window_count=arguments["windows"],
        scored=arguments["scored"],
        needle_lengths=lengths,
        needle_depths=arguments["depths"],
        greedy_tokens=arguments["greedy"],
        generation=ContinuationOptions(
            *(arguments[name] for name in ("generate", "samples", "temperature", "top_p", "seed")),
        ),
        reference=arguments["reference"] is not None,
        formats=formats,
        stored_bits=() if arguments["stored_bits"] is None else _numbers("stored-bits", arguments["stored_bits"], float, 16),
        selections=selections,
        tasks=parse_tasks(arguments["tasks"]),
        task_lengths=_numbers("task-lengths", arguments["task_lengths"], int),
        task_items=arguments["task_items"],
        task_batch=arguments["task_batch"],
        datasets=tuple(map(str, arguments["datasets"])),
        exact_tokens=ExactTokens.parse(arguments["exact_tokens"]),
        tolerance=None if arguments["tolerance"] is None else Tolerance.parse(arguments["tolerance"]),
    )


def _numbers(name: str, text: str, kind: Any, most: float | None = None) -> Any:
    from elastickv.errors import UsageError

    try:
        numbers = tuple(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        example = "4.25,4.75" if kind is float and most is not None else "2,4,8"
        raise UsageError(f"--{name}={text} is no list of numbers: write for example {example}") from None
    if not all(0 < number < float("inf") if most is None else 0 < number <= most for number in numbers):
        accepted = "above 0" if most is None else f"above 0 and at most {most:g}"
        raise UsageError(f"--{name}={text} is out of range: give numbers {accepted}")
    return numbers
