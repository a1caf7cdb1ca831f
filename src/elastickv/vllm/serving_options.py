"""What a user asks of the backend: `additional_config["elastickv"]` and the KV cache dtype."""

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from elastickv.errors import UsageError
from elastickv.recipe import PAGE_TOKENS, Recipe
from elastickv.recipe.recipe import DEFAULT_WINDOW
from elastickv.recipe.shape import is_whole
from elastickv.recipe.solver import MAX_RATIO

KEY = "elastickv"
PAGE_FORMATS: dict[str, str] = {
    "int4": "int4",
    "int8": "int8",
    "k8v4": "k=int8,v=int4",
    "fp8": "fp8",
    "int8_per_channel": "k=int8_per_channel,v=int8",
}
"""Name of a page format -> the recipe's text."""
CACHE_DTYPES: dict[str, str] = {f"elastickv_{name}": text for name, text in PAGE_FORMATS.items()}
"""KV cache dtype of vLLM -> the recipe's text."""
FORMAT_NAMES: dict[str, str] = dict(zip(CACHE_DTYPES, PAGE_FORMATS, strict=True))
"""KV cache dtype of vLLM -> name of the page format."""
PREFIX_REUSES = ("soft", "strict")
MIN_EXACT_TOKENS, MAX_EXACT_TOKENS = PAGE_TOKENS, 4096
_LAYERS = re.compile(r"(0|[1-9][0-9]{0,4})(?:-(0|[1-9][0-9]{0,4}))?")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class LayerFormat:
    """The page format of layers `first` to `last`, both included."""

    first: int
    last: int
    format: str

    @property
    def numbers(self) -> range:
        """The numbers of the layers."""
        return range(self.first, self.last + 1)

    def __str__(self) -> str:
        """Return the layers as an option names them."""
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True)
class ServingOptions:
    """Options of the backend; `parse` is the way to make them.

    Attributes
    ----------
    format : name of the page format, a key of `PAGE_FORMATS`; None: the KV cache dtype or a calibration says it.
    window : newest tokens that are exact.
    prefix_reuse : 'soft': a prefix hit needs no window blocks, and pages are read where they are gone; 'strict': it needs
        them, so that tokens do not depend on what is cached.
    layers : page formats of single layers, in ascending order; they override all else.
    calibration : path of a file by `elastickv calibrate`, which chooses the format of each layer.
    compress : dense bytes / bytes read that formats and the selection of pages must reach.
    calibration_hash : SHA-256 of the calibration's content, 64 hex digits; the file must have it.
    select_pages : whether decodes may read the best pages alone; False: formats reach `compress` by themselves.
    """

    format: str | None = None
    window: int = DEFAULT_WINDOW
    prefix_reuse: str = "soft"
    layers: tuple[LayerFormat, ...] = ()
    calibration: str | None = None
    compress: float | None = None
    calibration_hash: str | None = None
    select_pages: bool = True

    @classmethod
    def parse(cls, additional_config: object) -> "ServingOptions | None":
        """Return the options in vLLM's `additional_config`, or None if it has none for ElasticKV.

        Raises
        ------
        UsageError : if a key is unknown, a value is of a wrong type or out of range, or two options contradict each other.
        """
        if not isinstance(additional_config, Mapping) or KEY not in additional_config:
            return None
        passed = additional_config[KEY]
        if not isinstance(passed, Mapping):
            raise UsageError(f'{KEY} in `additional_config` is {_shown(passed)}: give an object such as {{"format": "int4"}}')
        accepted = [each.name for each in fields(cls)]
        for key in passed:
            if key not in accepted:
                raise UsageError(f"{KEY} has no option {_shown(key)}{_suggestion(key, accepted)}: it has {', '.join(accepted)}")
        options = cls(**{key: _CHECKS[key](value) for key, value in passed.items()})
        options._check_combination()
        return options

    def _check_combination(self) -> None:
        if self.calibration is not None and self.compress is None:
            raise UsageError(f"{KEY} option calibration needs compress too: give compress, a ratio such as 8")
        if not self.select_pages and self.calibration is None:
            raise UsageError(
                f"{KEY} option select_pages=false needs compress and calibration too: a file by `elastickv calibrate` chooses "
                "the formats that reach a ratio by themselves"
            )
        if self.calibration_hash is not None and self.calibration is None:
            raise UsageError(f"{KEY} option calibration_hash needs calibration too: give the path of the file")
        if self.calibration is not None and self.format is not None:
            raise UsageError(
                f"{KEY} options format and calibration contradict each other: the calibration chooses the format of each "
                "layer; leave out one of them"
            )


def asks_for_pages(vllm_config: Any) -> bool:
    """Whether vLLM's configuration has a KV cache dtype or options of ElasticKV."""
    additional = vllm_config.additional_config
    return vllm_config.cache_config.cache_dtype in CACHE_DTYPES or (isinstance(additional, Mapping) and KEY in additional)


def recipe_of(options: ServingOptions | None, kv_cache_dtype: str) -> Recipe:
    """Return the recipe of layers for which neither option `layers` nor a calibration says another.

    Its formats are those of the pages; it has no sinks, and its window is the number of exact tokens. With a calibration and
    dtype 'auto' the formats are int4's, as with `compress` alone.

    Parameters
    ----------
    options : as `parse` returns them; None is no option.
    kv_cache_dtype : vLLM's, as it was passed: 'auto' or a key of `CACHE_DTYPES`.

    Raises
    ------
    UsageError : if the dtype is none of ElasticKV's, contradicts the option `format`, or nothing says the format.
    """
    options = options or ServingOptions()
    if kv_cache_dtype == "auto":
        if options.format is None and options.compress is None:
            raise UsageError(
                f"nothing says the format of the pages: give {KEY} in `additional_config` the option format, one of "
                f"{', '.join(PAGE_FORMATS)}, or from vLLM 0.33 on a `kv_cache_dtype` such as elastickv_int4"
            )
        name = options.format or "int4"
    elif kv_cache_dtype not in FORMAT_NAMES:
        raise UsageError(
            f"`kv_cache_dtype={kv_cache_dtype}` is not stored by ElasticKV{_suggestion(kv_cache_dtype, list(FORMAT_NAMES))}: "
            f"give {', '.join(FORMAT_NAMES)}, or auto with the option format of {KEY}"
        )
    else:
        name = FORMAT_NAMES[kv_cache_dtype]
        if options.format not in (None, name):
            raise UsageError(
                f"`kv_cache_dtype={kv_cache_dtype}` and the option format={options.format} of {KEY} contradict each other: "
                "leave out one of them"
            )
    return page_recipe(name, options.window)


def page_recipe(name: str, exact_tokens: int) -> Recipe:
    """Return the recipe of a page format, a key of `PAGE_FORMATS`, beside a window of `exact_tokens` tokens."""
    return replace(Recipe.parse(PAGE_FORMATS[name]), sinks=0, window=exact_tokens)


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        return f"no usable {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _suggestion(name: object, accepted: list[str]) -> str:
    close = difflib.get_close_matches(name, accepted, 1, 0.8) if isinstance(name, str) else []
    return f" (did you mean {close[0]}?)" if close else ""


def _one_of(option: str, accepted: tuple[str, ...]) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in accepted:
            suggestion = _suggestion(value, list(accepted))
            raise UsageError(f"{KEY} option {option} is {_shown(value)}{suggestion}: give {', '.join(accepted)}")
        return value

    return check


def _window(value: Any) -> int:
    if not is_whole(value) or not MIN_EXACT_TOKENS <= value <= MAX_EXACT_TOKENS:
        raise UsageError(
            f"{KEY} option window is {_shown(value)}: give a whole number of tokens from {MIN_EXACT_TOKENS} to "
            f"{MAX_EXACT_TOKENS}"
        )
    return int(value)


def _layers(value: Any) -> tuple[LayerFormat, ...]:
    if not isinstance(value, Mapping) or not value:
        raise UsageError(f'{KEY} option layers is {_shown(value)}: give an object such as {{"0": "int8", "4-7": "k8v4"}}')
    formats = []
    for layers, name in value.items():
        matched = _LAYERS.fullmatch(layers) if isinstance(layers, str) else None
        first = int(matched[1]) if matched else 0
        last = int(matched[2] or matched[1]) if matched else -1
        if last < first:
            raise UsageError(
                f'{KEY} option layers names the layers {_shown(layers)}: give a number or an ascending range, "3" or "4-7"'
            )
        formats.append(LayerFormat(first, last, _one_of(f"layers[{layers}]", tuple(PAGE_FORMATS))(name)))
    formats.sort(key=lambda each: each.first)
    for each, following in zip(formats, formats[1:], strict=False):
        if following.first <= each.last:
            raise UsageError(
                f"{KEY} option layers names layer {following.first} twice, by {each} and {following}: give each layer once"
            )
    return tuple(formats)


def _calibration(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise UsageError(f"{KEY} option calibration is {_shown(value)}: give the path of a file by `elastickv calibrate`")
    return value


def _compress(value: Any) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 1 < value <= MAX_RATIO:
        raise UsageError(f"{KEY} option compress is {_shown(value)}: give a number above 1 and at most {MAX_RATIO:g}")
    return float(value)


def _calibration_hash(value: Any) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise UsageError(
            f"{KEY} option calibration_hash is {_shown(value)}: give the 64 hex digits of a SHA-256, or leave it out"
        )
    return value


def _select_pages(value: Any) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{KEY} option select_pages is {_shown(value)}: give true or false")
    return value


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "format": _one_of("format", tuple(PAGE_FORMATS)),
    "window": _window,
    "prefix_reuse": _one_of("prefix_reuse", PREFIX_REUSES),
    "layers": _layers,
    "calibration": _calibration,
    "compress": _compress,
    "calibration_hash": _calibration_hash,
    "select_pages": _select_pages,
}
