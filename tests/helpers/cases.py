"""What properties are tried on: any recipe on any shape, lengths around every edge, numbers from denormal to overflowing."""

from dataclasses import dataclass

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from elastickv.recipe import DENSE, PAGE_TOKENS, AttentionShape, Recipe
from elastickv.recipe.formats import FORMATS, value_groups

GROUPS = (1, 2, 3, 4, 5, 7, 8, 9, 16)
LONGEST = 700
DTYPES = ("bf16", "fp16", "fp32")
LARGEST = {"bf16": 3.3e38, "fp16": 65504.0, "fp32": 3.4e38}
LEAST_NORMAL = {"bf16": 2.0**-126, "fp16": 2.0**-14, "fp32": 2.0**-126}


def tried(examples: int) -> settings:
    """Return settings of so many examples, or as many times more as the profile asks for."""
    return settings(max_examples=max(1, examples * settings.default.max_examples // 100), deadline=None)


@dataclass(frozen=True)
class Case:
    """A cache to be made and what goes into it."""

    shape: AttentionShape
    recipe: Recipe
    dtype: str
    lengths: tuple[int, ...]
    anchor_offset: int = 0
    seed: int = 0
    numbers: str = "normal"

    @property
    def exact(self) -> str:
        return self.recipe.exact_dtype(self.dtype)

    def prompt(self):
        """Return (batch, kv_heads, longest, head_dim) keys and values, and queries to ask with."""
        shape, rng = self.shape, np.random.default_rng(self.seed)
        tokens = rng.standard_normal((2, shape.batch, shape.kv_heads, max(self.lengths), shape.head_dim), dtype=np.float32)
        queries = rng.standard_normal((shape.batch, shape.query_heads, shape.head_dim), dtype=np.float32)
        keys, values = tokens
        NUMBERS[self.numbers](self, rng, keys, values, queries)
        return keys, values, queries

    def token(self, seed: int):
        """Return one more token for every sequence: its keys, its values and queries."""
        shape, rng = self.shape, np.random.default_rng([self.seed, seed])
        rows = (shape.batch, shape.kv_heads, 1, shape.head_dim)
        keys, values = rng.standard_normal((2, *rows), dtype=np.float32)
        queries = rng.standard_normal((shape.batch, shape.query_heads, shape.head_dim), dtype=np.float32)
        NUMBERS[self.numbers](self, rng, keys, values, queries)
        return keys[:, :, 0], values[:, :, 0], queries


def _constant_channels(case, rng, keys, values, queries):
    keys[..., ::3], values[..., 1::3] = rng.choice([-5.0, 0.0, 3.0]), 7


def _outlier_channel(case, rng, keys, values, queries):
    keys[..., 5] *= 30
    keys[..., 7] += 40
    values[..., 2] *= 100


def _one_hot(case, rng, keys, values, queries):
    """Queries along one token's key: it outweighs the others by hundreds of nats."""
    chosen = keys[:, :, rng.integers(keys.shape[2])]
    queries[...] = np.repeat(chosen, case.shape.group, axis=1) * 8
    keys *= 4


def _equal(case, rng, keys, values, queries):
    keys[...], values[...] = keys[:, :, :1], values[:, :, :1]


def _zeros(case, rng, keys, values, queries):
    keys[...], values[...] = 0, 0


def _huge_keys(case, rng, keys, values, queries):
    """Keys up to what their format holds, and queries small enough that scores stay moderate."""
    limited = case.recipe.key_format is not None and FORMATS[case.recipe.key_format].largest_key is not None
    largest = min(LARGEST[case.exact], 65280.0 if limited else 1e30)  # a bfloat16, too
    keys *= largest / np.abs(keys).max()
    queries /= largest / 4


def _huge_values(case, rng, keys, values, queries):
    """Values whose sum over the context float32 still holds."""
    largest = min(LARGEST[case.exact], 2.0**127 / (32 * max(keys.shape[2], LONGEST)))
    values *= largest / np.abs(values).max()


def _tiny(case, rng, keys, values, queries):
    for array in (keys, values):
        array *= LEAST_NORMAL[case.exact] * 64
    queries *= 100


def _denormal(case, rng, keys, values, queries):
    for array in (keys, values):
        array *= LEAST_NORMAL[case.exact] / 8


def _mixed(case, rng, keys, values, queries):
    """Every token of a magnitude of its own."""
    low, high = (-4, 3) if case.exact == "fp16" else (-20, 15)
    values *= np.float32(10.0) ** rng.integers(low, high, (*values.shape[:3], 1)).astype(np.float32)
    keys *= np.float32(10.0) ** rng.integers(-6, 1, (*keys.shape[:3], 1)).astype(np.float32)


def _ties(case, rng, keys, values, queries):
    for array in (keys, values, queries):
        np.rint(array * 2, out=array)


NUMBERS = {
    "normal": lambda *_: None,
    "constant channels": _constant_channels,
    "outlier channels": _outlier_channel,
    "one-hot": _one_hot,
    "equal": _equal,
    "zeros": _zeros,
    "huge keys": _huge_keys,
    "huge values": _huge_values,
    "tiny": _tiny,
    "denormal": _denormal,
    "mixed": _mixed,
    "ties": _ties,
}


@st.composite
def recipes(
    draw,
    head_dim: int,
    kv_heads: int,
    selections=("dense", "all", "stride", "reuse", "pages"),
    few_bits: bool = False,
    rotations: bool = False,
) -> Recipe:
    """Return any recipe of a shape, rotated if `rotations`; windows may be larger than any context."""
    selection = draw(st.sampled_from(selections))
    if selection == "dense":
        return DENSE
    fields = {"sinks": draw(st.integers(0, 70)), "window": draw(st.one_of(st.integers(0, 200), st.just(5000)))}
    key = value = draw(st.sampled_from(["bf16", "fp16", "int8"]))
    if selection == "stride":
        fields["stride"] = draw(st.integers(1, 64))
    if selection == "reuse":
        fields |= {"anchor_every": draw(st.integers(1, 5)), "decay": draw(st.sampled_from([1.0, 0.95]))}
    if selection in ("all", "pages"):
        narrow = ["int4", "int3", "int2"] if few_bits else ["int4"]
        formats, per_channel = ["bf16", "fp16", "fp8", "int8", *narrow], [*narrow, "int8_per_channel"]
        key = draw(st.sampled_from(per_channel if selection == "pages" else [*formats, "int8_per_channel"]))
        value = draw(st.sampled_from([name for name in formats if {key, name} != {"bf16", "fp16"}]))
        fields["value_group"] = draw(st.sampled_from([0, *value_groups(head_dim)])) if value in narrow else 0
    if selection == "pages":
        heads = draw(st.sampled_from([1, kv_heads]))
        shares = st.sampled_from([1.0, 0.5, 0.3, 1 / 8])
        fields["fractions"] = tuple(draw(st.lists(shares, min_size=heads, max_size=heads)))
        fields["anchor_every"] = draw(st.integers(1, 5))
    if rotations:
        quantized = "".join(letter for letter, name in (("k", key), ("v", value)) if not FORMATS[name].is_float)
        fields["rotate"] = draw(
            st.sampled_from(["", *{"k": ["k"], "v": ["v"], "kv": ["k", "v", "kv", "kv"]}.get(quantized, [])])
        )
    return Recipe(key, value, selection=selection, **fields)


def lengths_of(recipe: Recipe, longest: int) -> st.SearchStrategy[int]:
    """Return lengths, often next to where a page, the sinks or the window begin."""
    edges = {recipe.sinks, recipe.window, *(recipe.sinks + recipe.window + n * PAGE_TOKENS for n in range(20))}
    near = sorted({edge + d for edge in edges for d in (-1, 0, 1) if 1 <= edge + d <= longest} | {1, 2})
    return st.one_of(st.sampled_from(near), st.integers(1, longest))


@st.composite
def cases(draw, kind, numbers=("normal",), longest: int = LONGEST, dtypes=DTYPES, **terms) -> Case:
    """Return any case that a kind of backend runs."""
    kv_heads, batch = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    group, head_dim = draw(st.sampled_from(kind.groups)), draw(st.sampled_from(kind.head_dims))
    recipe = draw(recipes(head_dim, kv_heads, few_bits="cuda" not in kind.name, **terms))
    return Case(
        AttentionShape(batch, kv_heads * group, kv_heads, head_dim),
        recipe,
        draw(st.sampled_from(dtypes)),
        tuple(draw(st.lists(lengths_of(recipe, longest), min_size=batch, max_size=batch))),
        draw(st.integers(0, recipe.anchor_every - 1)),
        draw(st.integers(0, 1 << 20)),
        draw(st.sampled_from(numbers)),
    )
