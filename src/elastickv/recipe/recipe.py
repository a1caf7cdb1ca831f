"""The recipe: a frozen value that says what is kept, in which format, refreshed when."""

import hashlib
import math
import re
from dataclasses import dataclass, replace

from elastickv.errors import UsageError
from elastickv.recipe.formats import COLD_FORMATS, sixteen_bit

SELECTIONS: tuple[str, ...] = ("all", "stride", "reuse")
DEFAULT_SINKS = 4
DEFAULT_WINDOW = 128
MAX_STRIDE = 64
MAX_ANCHOR_EVERY = 4096
MAX_WINDOW = 1 << 20
_HELP = (
    "a recipe is 'dense' or terms joined by commas: a format ("
    + ", ".join(COLD_FORMATS)
    + "), 'stride[=N]' or 'reuse[,anchor_every=N][,decay=D]', 'sinks=N', 'window=N'; for example int8,stride=2"
)


@dataclass(frozen=True)
class Recipe:
    """How one layer's KV cache is stored and read.

    Attributes
    ----------
    cold_format : format of cold K and V rows; None for `dense`, which keeps every token in the model's own dtype.
    selection : 'all'; 'stride' (every `stride`-th cold token, the only ones stored, mass-compensated); 'reuse' (the cold
        region's output is computed at anchors and reused in between).
    stride : step of the stride, 1 unless `selection == 'stride'`.
    anchor_every : steps from one anchor to the next, 1 unless `selection == 'reuse'`.
    decay : factor on the weight of a reused output per step of age (subtracted from its log-sum-exp as -log decay).
    sinks, window : exact tokens at the start and at the end.
    """

    cold_format: str | None = "bf16"
    selection: str = "all"
    stride: int = 1
    anchor_every: int = 1
    decay: float = 1.0
    sinks: int = DEFAULT_SINKS
    window: int = DEFAULT_WINDOW

    def __post_init__(self) -> None:
        if self.cold_format is not None and self.cold_format not in COLD_FORMATS:
            raise UsageError(f"format {self.cold_format!r} is unknown: formats are {', '.join(COLD_FORMATS)}")
        if self.selection not in SELECTIONS:
            raise UsageError(f"selection {self.selection!r} is unknown: selections are {', '.join(SELECTIONS)}")
        rest = (self.selection, self.stride, self.anchor_every, self.decay, self.sinks, self.window)
        if self.is_dense and rest != ("all", 1, 1, 1.0, 0, 0):
            raise UsageError("'dense' keeps and reads everything: it takes no other term")
        _check("stride", self.stride, 1, MAX_STRIDE)
        _check("anchor_every", self.anchor_every, 1, MAX_ANCHOR_EVERY)
        _check("sinks", self.sinks, 0, MAX_WINDOW)
        _check("window", self.window, 0, MAX_WINDOW)
        if self.stride > 1 and self.selection != "stride":
            raise UsageError(f"stride={self.stride} does not combine with selection {self.selection!r}")
        if self.anchor_every > 1 and self.selection != "reuse":
            raise UsageError(f"anchor_every={self.anchor_every} does not combine with {self.selection!r}: only with 'reuse'")
        if not (0 < self.decay <= 1):
            raise UsageError(f"decay={self.decay} is out of range: give a number above 0 and at most 1")
        if self.decay != 1 and self.selection != "reuse":
            raise UsageError(f"decay={self.decay} does not combine with {self.selection!r}: only with 'reuse'")

    @property
    def is_dense(self) -> bool:
        """Whether every token is kept in the model's own dtype and read at every step."""
        return self.cold_format is None

    @property
    def hash(self) -> str:
        """First 12 hex digits of the SHA-256 of all fields: equal recipes, equal hashes, in every version."""
        fields = (
            f"cold={self.cold_format or 'dense'};selection={self.selection};stride={self.stride};"
            f"anchor_every={self.anchor_every};decay={self.decay!r};sinks={self.sinks};window={self.window}"
        )
        return hashlib.sha256(fields.encode()).hexdigest()[:12]

    def age(self, step: int) -> int:
        """Steps since the last anchor at decode step `step` (0 is the first after prefill)."""
        return max(step, 0) % self.anchor_every

    def cached_log_weight(self, age: int) -> float:
        """What a reused output's log-sum-exp is moved by at `age` steps."""
        return age * math.log(self.decay)

    def exact_dtype(self, model_dtype: str) -> str:
        """Dtype of sinks and window: the model's own when dense or 16-bit, else the cold format, else bf16."""
        if self.is_dense:
            return model_dtype
        if self.cold_format in ("bf16", "fp16"):
            return self.cold_format
        return sixteen_bit(model_dtype)

    def __str__(self) -> str:
        """Short text that `parse` turns back into an equal recipe."""
        if self.cold_format is None:
            return "dense"
        terms = [self.cold_format]
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


def _check(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UsageError(f"{name}={value} is out of range: {low} to {high} is accepted")


DENSE = Recipe(cold_format=None, sinks=0, window=0)


def parse_open(text: str, default_format: str = "bf16") -> tuple[Recipe, str | None]:
    """Parse a recipe that may leave one number for the budget to decide.

    Returns
    -------
    recipe : with 1 where a number is open.
    open_field : 'stride' or 'anchor_every' when the text says `stride` or `reuse` without one, else None.
    """
    terms = [t.strip() for t in text.split(",")]
    if terms == ["dense"]:
        return DENSE, None
    values: dict[str, str | int | float] = {}
    given: set[str] = set()

    def put(name: str, value: str | int | float) -> None:
        if name == "selection" and name in given:
            raise UsageError(f"recipe {text!r}: 'stride' and 'reuse' do not combine; give one of them, once")
        if name in given:
            raise UsageError(f"recipe {text!r} names {name} twice")
        given.add(name)
        values[name] = value

    for term in terms:
        name, equals, raw = term.partition("=")
        name = name.replace("-", "_")
        if not equals and name in COLD_FORMATS:
            put("cold_format", name)
        elif not equals and name == "reuse":
            put("selection", "reuse")
        elif name == "stride":
            put("selection", "stride")
            if equals:
                put("stride", _whole(name, raw))
        elif equals and name in ("anchor_every", "sinks", "window"):
            put(name, _whole(name, raw))
        elif equals and name == "decay":
            put(name, _number(name, raw))
        else:
            raise UsageError(f"recipe {text!r}: {term!r} is not a term; {_HELP}")
    values.setdefault("cold_format", default_format)
    open_field = None
    if values.get("selection") == "stride" and "stride" not in given:
        open_field = "stride"
    if values.get("selection") == "reuse" and "anchor_every" not in given:
        open_field = "anchor_every"
    return replace(Recipe(), **values), open_field  # type: ignore[arg-type]


def _whole(name: str, raw: str) -> int:
    if not re.fullmatch(r"[0-9]{1,30}", raw):
        raise UsageError(f"{name}={raw} is not a whole number")
    return int(raw)


def _number(name: str, raw: str) -> float:
    if not re.fullmatch(r"[0-9]*\.?[0-9]+([eE][-+]?[0-9]{1,3})?|[0-9]+\.", raw):
        raise UsageError(f"{name}={raw} is not a number")
    return float(raw)
