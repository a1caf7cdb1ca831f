"""What to measure and how: one table of options, from which the command line, sweeps and `elastickv.bench` are made."""

from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from elastickv.benchmark.gate import Gate
from elastickv.errors import UsageError
from elastickv.recipe import DTYPES, AttentionShape, Recipe, resolve
from elastickv.recipe.recipe import DEFAULT_SINKS, DEFAULT_WINDOW
from elastickv.recipe.shape import MAX_CONTEXT, is_whole

PRESETS: dict[str, dict[str, int]] = {
    "long": {"seq": 4096, "heads": 32, "dim": 128, "compress": 4},
    "short": {"seq": 1024, "heads": 16, "dim": 64, "compress": 2},
}
CACHE_STATES: tuple[str, ...] = ("cold", "hot")
MAX_SEED = 2**31 - 1


@dataclass(frozen=True)
class OptionInfo:
    """The description of an option in addition to its type and default.

    Attributes
    ----------
    help : one sentence for the command line.
    bounds : lowest and highest value of a number.
    choices : values of a text.
    default_help : what a default of None means.
    sweep : 'axis' where a sweep takes several values, 'setting' where all cells share one, else None.
    """

    help: str
    bounds: tuple[float, float] | None = None
    choices: tuple[str, ...] = ()
    default_help: str | None = None
    sweep: str | None = None


def option(default: Any, help_text: str, **info: Any) -> Any:
    """Return a dataclass field with its `OptionInfo`."""
    return field(default=default, metadata={"option": OptionInfo(help_text, **info)})


def axis(default: Any, help_text: str, **info: Any) -> Any:
    """Return an option that takes several values in a sweep."""
    return option(default, help_text, sweep="axis", **info)


def setting(default: Any, help_text: str, **info: Any) -> Any:
    """Return an option that all cells of a sweep share."""
    return option(default, help_text, sweep="setting", **info)


@dataclass(frozen=True)
class Options:
    """One benchmark run; the defaults are the original micro-benchmark's.

    Attributes
    ----------
    seq : context, tokens.
    heads, kv_heads, dim, batch : shape; `kv_heads` None is MHA.
    compress : the budget C.
    recipe : recipe text, or 'auto'.
    sinks, window, anchor_every : override the recipe's.
    dtype : the model's own: 'fp32', 'fp16', 'bf16'.
    reps, warmup : samples of each contender, and discarded samples before them.
    inner_loops : decode steps to a sample.
    truncate : percent of samples cut at either end.
    paired : interleave dense and elastic in randomized ABBA blocks.
    inference, decode_tokens, layers : the inference cycle; `layers` None is enough to exceed the last-level cache.
    graphs : capture CUDA graphs.
    cache : 'cold' rotates copies past the last-level cache, 'hot' repeats one.
    peers : peers to measure too: 'all', or beginnings of their names joined by commas; None is none.
    time_limit_s : seconds for the whole run; what is left out to keep it is in the result.
    until_ci_percent : stop early, at a half-width of the speed-up's interval.
    input : safetensors file of real activations; None is the shipped sample.
    gate : criteria for a verdict.
    dense : dtype of the only dense contender of ours; None tries all and takes the fastest.
    backend, device, seed : where, and with which random numbers.
    command : the command line, for the record; empty when called from Python.

    Raises
    ------
    UsageError : if a value is out of range, or no recipe meets the budget.
    """

    # A sweep's cells are ordered by their axes as they stand here, and its hash depends on that order.
    seq: int = axis(1024, "Context, tokens.", bounds=(1, MAX_CONTEXT))
    batch: int = axis(1, "Sequences decoded together.", bounds=(1, 65535))
    compress: float = axis(2.0, "Budget C: read at most 1/C of the dense KV bytes.")
    recipe: str = axis("auto", "auto, or a recipe text such as int8,stride=2.")
    heads: int = axis(16, "Query heads.", bounds=(1, 65536))
    kv_heads: int | None = axis(None, "KV heads.", bounds=(1, 65535), default_help="as many as query heads")
    dim: int = axis(64, "Elements of a head.")
    dtype: str = axis("bf16", "The model's own dtype: fp32, fp16 or bf16.", choices=DTYPES)
    cache: str = axis("cold", "cold rotates copies past the last-level cache; hot repeats one.", choices=CACHE_STATES)
    sinks: int | None = axis(None, "Exact tokens at the start.", default_help=str(DEFAULT_SINKS))
    window: int | None = axis(None, "Exact tokens at the end.", default_help=str(DEFAULT_WINDOW))
    anchor_every: int | None = axis(None, "Steps from one anchor to the next.")
    backend: str = setting("auto", "auto, cpu or cuda.")
    device: int | None = option(None, "Number of the CUDA device.", bounds=(0, 1023), default_help="0")
    reps: int = setting(200, "Samples of each contender.", bounds=(2, 1_000_000))
    warmup: int = setting(20, "Samples discarded before.", bounds=(0, 1_000_000))
    inner_loops: int = setting(64, "Decode steps to a sample.", bounds=(1, 65536))
    truncate: float = setting(5.0, "Percent of samples cut at either end for times.", bounds=(0, 45))
    paired: bool = option(False, "Interleave dense and elastic in randomized ABBA blocks.")
    until_ci_percent: float | None = setting(None, "Stop at this half-width of the interval, percent.", bounds=(0.01, 50))
    time_limit_s: float | None = option(
        None, "End the whole run, compilation included, after about this many seconds.", bounds=(0.1, 86_400)
    )
    inference: bool = setting(False, "Run the inference cycle too.")
    decode_tokens: int = setting(64, "Tokens of the inference cycle.", bounds=(1, 65536))
    layers: int | None = setting(
        None, "Caches of the inference cycle.", bounds=(1, 1024), default_help="enough to exceed the last-level cache"
    )
    graphs: bool = setting(True, "Launch kernels one by one instead of a captured graph.")
    peers: str | None = setting(
        None,
        "Measure installed peers in the same run: all, or those whose names begin so (torch-sdpa,flashinfer-paged).",
    )
    input: Path | None = setting(  # noqa: RUF009 - a field like the others
        None, "Safetensors file with q, k, v of real layers.", default_help="shipped"
    )
    dense: str | None = setting(
        None,
        "Dtype of our dense contender, so that runs to be compared share it.",
        choices=DTYPES,
        default_help="the fastest",
    )
    seed: int = setting(0, "Seed of all random numbers.", bounds=(0, MAX_SEED))
    gate: Gate | None = None
    command: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, info in OPTIONS.items():
            check_option(name, getattr(self, name), info, TYPES[name])
        if self.inference and self.seq + self.decode_tokens > MAX_CONTEXT:
            raise UsageError(f"`seq` {self.seq} and {self.decode_tokens} decoded tokens exceed {MAX_CONTEXT}: give fewer")
        if self.until_ci_percent is not None and not self.paired:
            raise UsageError("`until_ci_percent` watches the interval of pairs: add `paired=True`")
        if self.peers is not None and not self.peers.strip(" ,"):
            raise UsageError(f"`peers`={self.peers} names nobody: give 'all', or beginnings of names joined by commas")
        _ = self.shape, self.resolved_recipe

    @property
    def shape(self) -> AttentionShape:
        """The layer's shape."""
        return AttentionShape(self.batch, self.heads, self.kv_heads or self.heads, self.dim)

    @cached_property
    def resolved_recipe(self) -> Recipe:
        """The recipe with its open numbers decided by the budget, solved once."""
        return self.recipe_at(self.seq, self.shape)

    def recipe_at(self, context: int, shape: AttentionShape) -> Recipe:
        """Return the recipe as solved for another context and shape."""
        return resolve(self.recipe, self.compress, context, shape, self.dtype, self.sinks, self.window, self.anchor_every)


def options_of(table: type) -> dict[str, OptionInfo]:
    """Return the options of a dataclass, in their order."""
    return {each.name: each.metadata["option"] for each in fields(table) if "option" in each.metadata}


def types_of(table: type) -> dict[str, type]:
    """Return the type of each option of a dataclass, without its None."""
    return {name: _required(hint) for name, hint in get_type_hints(table).items() if name in options_of(table)}


def defaults_of(table: type) -> dict[str, Any]:
    """Return the default of each option of a dataclass."""
    return {each.name: each.default for each in fields(table) if "option" in each.metadata}


def _required(hint: Any) -> type:
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] if get_origin(hint) is UnionType else [hint]
    kind: type = kinds[0]
    return kind


OPTIONS = options_of(Options)
TYPES = types_of(Options)
AXES = tuple(name for name, info in OPTIONS.items() if info.sweep == "axis")
# What all cells of a sweep share. The sweep itself sets the rest: devices, pairing, its own time limit.
SETTINGS = tuple(name for name, info in OPTIONS.items() if info.sweep == "setting")


def check_option(name: str, value: Any, info: OptionInfo, kind: type) -> None:
    """Refuse a value outside the bounds or choices of its option; None is no value.

    Raises
    ------
    UsageError : saying what is accepted.
    """
    if value is None:
        return
    if info.bounds is not None:
        low, high = info.bounds
        if kind is int and not is_whole(value):
            raise UsageError(f"`{name}`={value} is not a whole number: {low} to {high} is accepted")
        if not low <= value <= high:
            raise UsageError(f"`{name}`={value} is out of range: {low} to {high} is accepted")
    if info.choices and value not in info.choices:
        raise UsageError(f"`{name}`={value} is unknown: choose {', '.join(info.choices)}")
