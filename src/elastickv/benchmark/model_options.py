"""The options of runs of a whole model: `elastickv.bench(model=...)`, the baselines, and generating text."""

from dataclasses import dataclass

from elastickv.benchmark.options import option
from elastickv.recipe import DTYPES

_COMPRESS = "Budget C: decodes read at most 1/C of the dense KV bytes."
USUAL_DTYPE = "bf16 on cuda, fp32 on cpu"


@dataclass(frozen=True)
class ModelOptions:
    """The options that mean something with a model, and their defaults there; others are refused rather than ignored.

    With a recipe there is no `compress` unless it is requested too.
    """

    seq: int = option(4096, "Context, tokens.")
    batch: int = option(1, "Sequences decoded together.")
    compress: float = option(4.0, _COMPRESS)
    recipe: str = option("auto", "auto, or a recipe text such as int8,stride=2.")
    dtype: str | None = option(None, "The model's own dtype.", choices=DTYPES, default_help=USUAL_DTYPE)
    backend: str = option("auto", "auto, cpu or cuda.")
    device: int | None = option(None, "Number of the CUDA device.", default_help="0")
    reps: int = option(8, "Samples of each cache.")
    decode_tokens: int = option(32, "Decodes of a sample.")
    seed: int = option(0, "Seed of the order, the prompts and random weights.")
    graphs: bool = option(True, "Run decodes operation by operation instead of as captured CUDA graphs.")


@dataclass(frozen=True)
class BaselineOptions:
    """The options that `elastickv baseline` has for every program."""

    context: int = option(512, "Tokens of the prompt.")
    reps: int = option(6, "Samples of each cache.")
    decode_tokens: int = option(16, "Decodes of a sample.")
    scored: int = option(16, "Predictions whose loss is measured; 0: none.")
    seed: int = option(0, "Seed of the order.")


@dataclass(frozen=True)
class TransformersBaselineOptions(BaselineOptions):
    """The options of the baseline with stock and elastic caches; no `compress` with a recipe, as for `ModelOptions`."""

    compress: float = option(2.0, _COMPRESS)


@dataclass(frozen=True)
class GgufBaselineOptions(BaselineOptions):
    """The options of the baseline with llama.cpp's caches."""

    kv_types: str = option("f16,q8_0,q4_0", "KV cache types; the first is the reference.")
    threads: int | None = option(None, "Threads of the CPU.", default_help="all")


@dataclass(frozen=True)
class GenerationOptions:
    """The options of `elastickv run` that have a default; no `compress` with a recipe, as for `ModelOptions`."""

    compress: float = option(ModelOptions.compress, _COMPRESS)
    max_new_tokens: int = option(256, "Tokens to generate at most.")
    temperature: float = option(0.0, "0 takes the likeliest token.")
    seed: int = option(0, "Seed of the random numbers.")


def requested_compress(compress: float | None, recipe: str | None, default: float) -> float | None:
    """Return the budget of a run with a model: `default` where neither a budget nor a recipe is requested."""
    return default if compress is None and recipe is None else compress
