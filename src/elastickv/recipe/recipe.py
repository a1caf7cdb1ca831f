"""The recipe: a frozen value that says what is stored, in which format, and when it is refreshed."""

import hashlib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from elastickv.errors import UsageError
from elastickv.recipe.formats import DTYPES, FORMATS, MIN_VALUE_GROUP, ScaleLayout, cold_formats, sixteen_bit, value_groups
from elastickv.recipe.shape import AttentionShape, is_whole

SELECTIONS: tuple[str, ...] = ("all", "stride", "reuse", "pages")
DEFAULT_SINKS = 4
DEFAULT_WINDOW = 128
MAX_STRIDE = 64
MAX_ANCHOR_EVERY = 4096
MAX_WINDOW = 1 << 20
_MAX_DENOMINATOR = 999_999_999
DEFAULT_SCORER = "bounds"
ROUNDINGS: tuple[str, ...] = ("nearest", "gptq")
_SCORER_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Recipe:
    """How one layer's KV cache is stored and read.

    Attributes
    ----------
    key_format, value_format : formats of cold K and V; None for `dense`, which stores all tokens in the model's own dtype.
    value_group : channels of V that share a scale in 4 bits or fewer; 0 is the whole head.
    selection : 'all'; 'stride' (every `stride`-th cold token, the only ones stored, mass-compensated); 'reuse' (the cold
        region's output is computed at anchors and reused in between); 'pages' (the pages that score best at an anchor).
    stride : step of the stride, 1 unless `selection == 'stride'`.
    anchor_every : steps from one anchor to the next, 1 unless `selection` is 'reuse' or 'pages'.
    decay : factor on the weight of a reused output per step since its anchor (added to its log-sum-exp as log decay).
    fractions : 'pages': the share of the cold pages that is read, one for all KV heads or one for each.
    sinks, window : exact tokens at the start and at the end.
    scorer : 'pages': the name of the page scorer, a key of `kvcache.scorers.SCORERS`, which the caches look up.
    rotate : 'k', 'v' or 'kv': K, V or both are stored after an orthonormal Hadamard rotation of their heads
        (`kvcache.hadamard`); '' for neither.
    rounding : how codes are chosen: 'nearest', or 'gptq' (`kvcache.gptq`), which needs a calibration and changes no bytes.
    """

    # `recipe.solver`, which makes recipes and therefore imports this module, puts its `for_ratio` here.
    solver: ClassVar[Callable[..., "Recipe"]]

    key_format: str | None = "bf16"
    value_format: str | None = "bf16"
    value_group: int = 0
    selection: str = "all"
    stride: int = 1
    anchor_every: int = 1
    decay: float = 1.0
    fractions: tuple[float, ...] = ()
    sinks: int = DEFAULT_SINKS
    window: int = DEFAULT_WINDOW
    scorer: str = DEFAULT_SCORER
    rotate: str = ""
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        for name in (self.key_format, self.value_format):
            if name is not None and name not in cold_formats():
                raise UsageError(f"format {name!r} is unknown: formats are {', '.join(cold_formats())}")
        if self.selection not in SELECTIONS:
            raise UsageError(f"selection {self.selection!r} is unknown: selections are {', '.join(SELECTIONS)}")
        rest = (
            self.selection,
            self.stride,
            self.anchor_every,
            self.decay,
            self.fractions,
            self.sinks,
            self.window,
            self.scorer,
            self.rotate,
            self.rounding,
        )
        plain = ("all", 1, 1, 1.0, (), 0, 0, DEFAULT_SCORER, "", "nearest")
        if self.is_dense and (self.value_format is not None or rest != plain):
            raise UsageError("'dense' keeps and reads everything: it takes no other term")
        # 1, 1.0 and NumPy's 1.0 are equal: text and hash must be too.
        object.__setattr__(self, "decay", float(self.decay))
        object.__setattr__(self, "fractions", tuple(map(float, self.fractions)))
        _check("stride", self.stride, 1, MAX_STRIDE)
        _check("anchor_every", self.anchor_every, 1, MAX_ANCHOR_EVERY)
        _check("sinks", self.sinks, 0, MAX_WINDOW)
        _check("window", self.window, 0, MAX_WINDOW)
        if self.stride > 1 and self.selection != "stride":
            raise UsageError(f"stride={self.stride} does not combine with selection {self.selection!r}")
        if self.anchor_every > 1 and self.selection not in ("reuse", "pages"):
            raise UsageError(
                f"anchor_every={self.anchor_every} does not combine with {self.selection!r}: only with 'pages' and 'reuse'"
            )
        if not (0 < self.decay <= 1):
            raise UsageError(f"decay={self.decay} is out of range: give a number above 0 and at most 1")
        if self.decay != 1 and self.selection != "reuse":
            raise UsageError(f"decay={self.decay} does not combine with {self.selection!r}: only with 'reuse'")
        self._check_formats()
        self._check_fractions()
        self._check_scorer()
        self._check_rotation()
        self._check_rounding()

    def _check_formats(self) -> None:
        k, v = self.key_format, self.value_format
        if v is None and not self.is_dense:
            raise UsageError(f"keys in {k} need a format for the values: formats are {', '.join(cold_formats())}")
        if v is not None and FORMATS[v].values is None:
            of_values = ", ".join(name for name in cold_formats() if FORMATS[name].values is not None)
            raise UsageError(f"format {v} stores keys only: write k={v} and v= one of {of_values}")
        if {k, v} == {"bf16", "fp16"}:
            raise UsageError("k=bf16 and v=fp16 do not combine, nor the other way round: sinks and window have one dtype")
        by_row = [name for name in cold_formats() if FORMATS[name].by_row]
        if self.selection in ("stride", "reuse") and (k != v or k not in by_row):
            raise UsageError(
                f"{self.selection!r} does not combine with {self.formats}: it takes one of {', '.join(by_row)} for K and V"
            )
        if self.selection == "pages" and not has_page_bounds(k):
            bounded = _one_of(f"k={name}" for name in cold_formats() if has_page_bounds(name))
            raise UsageError(f"'pages' does not combine with keys in {k}: the scorer reads scales of channels; write {bounded}")
        grouped = _one_of(name for name in cold_formats() if FORMATS[name].values is ScaleLayout.GROUP)
        if self.value_group and (v is None or FORMATS[v].values is not ScaleLayout.GROUP):
            raise UsageError(f"vgroup={self.value_group} does not combine with values in {v}: only with {grouped}")
        if self.value_group and self.value_group < MIN_VALUE_GROUP:
            raise UsageError(f"vgroup={self.value_group} is out of range: {MIN_VALUE_GROUP} or more is accepted")

    def _check_scorer(self) -> None:
        if not isinstance(self.scorer, str) or not _SCORER_NAME.fullmatch(self.scorer):
            raise UsageError(f"scorer={self.scorer} is no name of a page scorer: write scorer={DEFAULT_SCORER}")
        if self.scorer != DEFAULT_SCORER and self.selection != "pages":
            raise UsageError(f"scorer={self.scorer} does not combine with {self.selection!r}: only with 'pages'")

    def _check_rotation(self) -> None:
        if self.rotate not in ("", "k", "v", "kv"):
            raise UsageError(f"rotate={self.rotate} is no choice of tensors: write rotate=k, rotate=v or rotate=kv")
        stored = (("k", "keys", self.key_format), ("v", "values", self.value_format))
        for letter, tensor, name in stored:
            if letter in self.rotate and name is not None and FORMATS[name].is_float:
                raise UsageError(f"rotate={self.rotate} does not combine with {tensor} in {name}: only with quantized ones")

    def _check_rounding(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise UsageError(f"rounding={self.rounding} is unknown: write rounding={' or rounding='.join(ROUNDINGS)}")
        if not self.uses_hessians:
            return
        if not any(name is not None and FORMATS[name].is_integer for name in (self.key_format, self.value_format)):
            integers = ", ".join(name for name in cold_formats() if FORMATS[name].is_integer)
            raise UsageError(f"rounding={self.rounding} does not combine with {self.formats}: K or V in one of {integers}")
        if self.selection == "stride":
            raise UsageError(f"rounding={self.rounding} does not combine with 'stride', which stores single rows")

    def _check_fractions(self) -> None:
        if (self.selection == "pages") != bool(self.fractions):
            raise UsageError("'pages' takes a fraction for all KV heads, or one for each: pages=1/4 or pages=1/4:1/2")
        for fraction in self.fractions:
            if not 0 < fraction <= 1:
                raise UsageError(f"pages={fraction} is out of range: give a fraction above 0 and at most 1")

    def check_shape(self, head_dim: int, kv_heads: int) -> None:
        """Check that the recipe fits a shape.

        Raises
        ------
        UsageError : if `vgroup` does not divide the head, or the fractions are neither one nor one for each KV head.
        """
        if self.value_group and self.value_group not in value_groups(head_dim):
            accepted = ", ".join(map(str, value_groups(head_dim)))
            raise UsageError(f"vgroup={self.value_group} does not divide a head of {head_dim} channels: choose {accepted}")
        if len(self.fractions) > 1 and len(self.fractions) != kv_heads:
            raise UsageError(f"pages= names {len(self.fractions)} fractions for {kv_heads} KV heads: give one, or {kv_heads}")

    @property
    def formats(self) -> str:
        """Formats as the recipe's text names them: one for both, or k=FORMAT,v=FORMAT."""
        if self.key_format is None:
            return "dense"
        return self.key_format if self.key_format == self.value_format else f"k={self.key_format},v={self.value_format}"

    def fraction(self, kv_head: int) -> float:
        """Share of the cold pages that one KV head reads; 1 without a selection of pages."""
        if not self.fractions:
            return 1.0
        return self.fractions[kv_head] if len(self.fractions) > 1 else self.fractions[0]

    def v_group(self, head_dim: int) -> int:
        """Channels of V that share a scale in 4 bits or fewer."""
        return self.value_group or head_dim

    @property
    def rotates_keys(self) -> bool:
        """Whether K is stored rotated, so that queries are rotated too."""
        return "k" in self.rotate

    @property
    def rotates_values(self) -> bool:
        """Whether V is stored rotated, so that outputs are rotated back."""
        return "v" in self.rotate

    @property
    def uses_hessians(self) -> bool:
        """Whether codes are chosen by the Hessians of a calibration."""
        return self.rounding == "gptq"

    @property
    def is_dense(self) -> bool:
        """Whether every token is stored in the model's own dtype and read at every step."""
        return self.key_format is None

    @property
    def hash(self) -> str:
        """First 12 hex digits of the SHA-256 of all fields: equal recipes, equal hashes, in every version."""
        fields = (
            f"cold={self.formats};selection={self.selection};stride={self.stride};"
            f"anchor_every={self.anchor_every};decay={self.decay!r};sinks={self.sinks};window={self.window}"
        )
        # Only if set: recipes that were hashed before these fields existed keep their hash.
        if self.value_group:
            fields += f";value_group={self.value_group}"
        if self.fractions:
            fields += f";fractions={':'.join(map(repr, self.fractions))}"
        if self.scorer != DEFAULT_SCORER:
            fields += f";scorer={self.scorer}"
        if self.rotate:
            fields += f";rotate={self.rotate}"
        if self.rounding != "nearest":
            fields += f";rounding={self.rounding}"
        return hashlib.sha256(fields.encode()).hexdigest()[:12]

    def steps_since_refresh(self, step: int, anchor_offset: int = 0) -> int:
        """Steps since the last anchor at decode step `step` (0 is the first after prefill, and always an anchor).

        Parameters
        ----------
        anchor_offset : 0 to anchor_every - 1: from step 1 on, a step is an anchor if (step + anchor_offset) % anchor_every
            is 0.
        """
        step = max(step, 0)
        return min(step, (step + anchor_offset) % self.anchor_every)

    def layer_anchor_offset(self, layer: int, layers: int) -> int:
        """Return the anchor offset of one of `layers` layers that spreads their anchors evenly over an interval."""
        return layer * self.anchor_every // layers % self.anchor_every

    def check_anchor_offset(self, anchor_offset: int) -> None:
        """Raise ValueError unless an anchor offset is 0 to anchor_every - 1."""
        if not is_whole(anchor_offset) or not 0 <= anchor_offset < self.anchor_every:
            raise ValueError(f"anchor_offset {anchor_offset} is out of range: {self} takes 0 to {self.anchor_every - 1}")

    def age(self, step: int, phase: int = 0) -> int:
        """Return `steps_since_refresh`, under its former name."""
        return self.steps_since_refresh(step, phase)

    def layer_phase(self, layer: int, layers: int) -> int:
        """Return `layer_anchor_offset`, under its former name."""
        return self.layer_anchor_offset(layer, layers)

    def check_phase(self, phase: int) -> None:
        """Do what `check_anchor_offset` does, under its former name."""
        self.check_anchor_offset(phase)

    def cached_log_weight(self, steps_since_refresh: int) -> float:
        """Return what to add to a reused output's log-sum-exp `steps_since_refresh` steps after its anchor."""
        return steps_since_refresh * math.log(self.decay)

    def exact_dtype(self, model_dtype: str) -> str:
        """Dtype of sinks and window: the model's own when dense or 16-bit, else the cold format, else bf16."""
        if self.is_dense:
            return model_dtype
        for name in (self.key_format, self.value_format):
            if name in DTYPES:
                return str(name)
        return sixteen_bit(model_dtype)

    def __str__(self) -> str:
        """Short text that `parse` turns back into an equal recipe."""
        if self.is_dense:
            return "dense"
        terms = [self.formats]
        if self.value_group:
            terms.append(f"vgroup={self.value_group}")
        if self.rotate:
            terms.append(f"rotate={self.rotate}")
        if self.rounding != "nearest":
            terms.append(f"rounding={self.rounding}")
        if self.selection == "pages":
            terms.append(f"pages={':'.join(map(_shortest, self.fractions))}")
            if self.anchor_every != 1:
                terms.append(f"anchor_every={self.anchor_every}")
            if self.scorer != DEFAULT_SCORER:
                terms.append(f"scorer={self.scorer}")
        if self.selection == "stride":
            terms.append(f"stride={self.stride}")
        if self.selection == "reuse":
            terms += ["reuse", f"anchor_every={self.anchor_every}"]
            if self.decay != 1:
                terms.append(f"decay={self.decay!r}")
        if self.sinks != DEFAULT_SINKS:
            terms.append(f"sinks={self.sinks}")
        if self.window != DEFAULT_WINDOW:
            terms.append(f"window={self.window}")
        return ",".join(terms)

    @classmethod
    def for_ratio(cls, ratio: float, context: int, shape: AttentionShape | None = None, **options: Any) -> "Recipe":
        """Return the recipe of least predicted loss that reads at most 1/ratio of the dense bytes: `recipe.for_ratio`.

        Without a shape: for one sequence of 32 query heads and 8 KV heads of 128 channels.
        """
        return cls.solver(ratio, context, shape or AttentionShape(1, 32, 8, 128), **options)

    @classmethod
    def parse(cls, text: str) -> "Recipe":
        """Return the recipe that `text` names.

        Raises
        ------
        UsageError : if the text is not a recipe, or leaves the step of `stride` or the anchors of `reuse` open.
        """
        recipe, open_field = parse_open(text)
        if open_field:
            raise UsageError(f"recipe {text!r} leaves {open_field} open: write {open_field}=N")
        return recipe


def _one_of(names: Iterable[str]) -> str:
    """Return 'a, b or c'."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def _check(name: str, value: int, low: int, high: int) -> None:
    if not is_whole(value):
        raise UsageError(f"{name}={value} is not a whole number")
    if not low <= value <= high:
        raise UsageError(f"{name}={value} is out of range: {low} to {high} is accepted")


DENSE = Recipe(key_format=None, value_format=None, sinks=0, window=0)


def parse_open(text: str, default_format: str = "bf16") -> tuple[Recipe, str | None]:
    """Parse a recipe that may leave one number for the solver to decide.

    Returns
    -------
    recipe : with 1 where a number is open.
    open_field : 'stride', 'anchor_every' or 'pages' when the text says `stride`, `reuse` or `pages` without one, else None.
    """
    terms = [t.strip() for t in text.split(",")]
    if terms == ["dense"]:
        return DENSE, None
    values: dict[str, Any] = {}
    named: set[str] = set()

    def put(name: str, value: Any) -> None:
        if name == "selection" and name in named:
            raise UsageError(f"recipe {text!r}: 'pages', 'stride' and 'reuse' do not combine; give one of them, once")
        if name in named:
            raise UsageError(f"recipe {text!r} names {name} twice")
        named.add(name)
        values[name] = value

    for term in terms:
        name, equals, raw = term.partition("=")
        name = name.replace("-", "_")
        if not equals and name in cold_formats():
            put("key_format", name)
            put("value_format", name)
        elif equals and name in ("k", "v"):
            put("key_format" if name == "k" else "value_format", raw)
        elif not equals and name == "reuse":
            put("selection", "reuse")
        elif name == "stride":
            put("selection", "stride")
            if equals:
                put("stride", _whole(name, raw))
        elif name == "pages":
            put("selection", "pages")
            values["fractions"] = tuple(_fraction(part) for part in raw.split(":")) if equals else (1.0,)
            named.update(["fractions"] if equals else [])
        elif equals and name in ("anchor_every", "sinks", "window"):
            put(name, _whole(name, raw))
        elif equals and name == "vgroup":
            put("value_group", _whole(name, raw))
        elif (equals and name == "scorer") or (raw and name in ("rotate", "rounding")):
            put(name, raw)
        elif equals and name == "decay":
            put(name, _number(name, raw))
        else:
            raise UsageError(f"recipe {text!r}: {term!r} is not a term; {_help()}")
    selection = values.get("selection")
    values.setdefault("key_format", values.get("value_format", default_format) if selection != "pages" else "int4")
    values.setdefault("value_format", values["key_format"])
    open_field = None
    for name, field in (("stride", "stride"), ("reuse", "anchor_every"), ("pages", "fractions")):
        if selection == name and field not in named:
            open_field = "pages" if field == "fractions" else field
    return replace(Recipe(), **values), open_field


def has_page_bounds(key_format: str | None) -> bool:
    """Return whether K stores a scale and zero for each channel of a page, which is what page scorers read."""
    return key_format is not None and FORMATS[key_format].keys is ScaleLayout.CHANNEL


def _help() -> str:
    return (
        f"a recipe is 'dense' or terms joined by commas: a format ({', '.join(cold_formats())}) or k=FORMAT,v=FORMAT, "
        "'vgroup=N' (channels of V to a scale in 4 bits or fewer), 'rotate=k', 'rotate=v' or 'rotate=kv', 'rounding=gptq', "
        "'pages[=FRACTION][,anchor_every=N][,scorer=NAME]', "
        "'stride[=N]' or 'reuse[,anchor_every=N][,decay=D]', 'sinks=N', 'window=N'; for example int4,pages=1/4,anchor_every=4"
    )


def _whole(name: str, raw: str) -> int:
    if not re.fullmatch(r"[0-9]{1,30}", raw):
        raise UsageError(f"{name}={raw} is not a whole number")
    return int(raw)


def _number(name: str, raw: str) -> float:
    if not re.fullmatch(r"[0-9]*\.?[0-9]+([eE][-+]?[0-9]{1,3})?|[0-9]+\.", raw):
        raise UsageError(f"{name}={raw} is not a number")
    return float(raw)


def _fraction(raw: str) -> float:
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", raw)
    if not match:
        return _number("pages", raw)
    if not int(match[2]):
        raise UsageError(f"pages={raw} divides by zero")
    return int(match[1]) / int(match[2])


def _shortest(fraction: float) -> str:
    """Return `fraction` as one over a whole number where it is that exactly and parses back, else with all its digits."""
    whole = round(1 / max(fraction, 1 / _MAX_DENOMINATOR))
    return (f"1/{whole}" if whole > 1 else "1") if 1 / whole == fraction else repr(fraction)
