"""Selects the kernel, and its build, for a shape, dtype and recipe on an architecture."""

from dataclasses import dataclass

from elastickv.backends.cuda.compiler import Compiled, compile_source
from elastickv.backends.cuda.format_macros import format_of
from elastickv.backends.cuda.page_layout import query_vectors
from elastickv.errors import UsageError
from elastickv.kvcache.scorers import SCORERS, scorer_of
from elastickv.recipe import FORMATS, PAGE_TOKENS, AttentionShape, Recipe
from elastickv.recipe.formats import ScaleLayout, round_up

TYPES = {f.name: f.cuda_dtype for f in FORMATS.values() if f.cuda_dtype is not None}
_COLD_NONE, _COLD_SAME, _COLD_INT8, _COLD_PAGES = range(4)
_PAGE_FORMATS = {f.name: f.cuda_id for f in FORMATS.values() if f.cuda_id is not None}
_ROTATED = {"k": 1, "v": 2, "kv": 3}  # values of the macro ROTATED
_ONE_QUERY_TILE = (("REUSE", 0), ("QTILES", 1))
MMA_SINCE = 80
_WARPS = 8  # of a block of kernels that are compiled for one block size only
_BULK_SINCE = 90
_DENSE_PAGES_FROM = 400 << 20  # bytes of K and V
_PAGED_INT8_FROM = 32  # (sequence, KV head) pairs
_HEADS_OF_MMA_TILE = 8
KEYS_AS_ROWS_MOST_HEADS = 4
"""Query heads of a KV head up to which keys are the rows of a product: the two parts of each query fill its eight columns."""
PAGE_ALIGNMENT_BYTES = 128
"""Of pages in memory and of stages of a ring: PAGE_STRIDE of kernels/pages.cuh."""
KINDS = ("auto", "mma", "simt", "pages")
_SPLIT_WARPS = 8
_MOST_ROUNDS = 4  # units of one warp up to which waiting costs more than an even split of the work gains
LARGEST_CLUSTER = 8
_SELECTING_AT_ONCE = 3  # blocks of a multiprocessor
ONE_BLOCK_PAGES = 8192  # whose scores fit its shared memory: SHARED_SCORES of kernels/best_pages.cuh
_LEAST_BUSY = 0.9  # share of the multiprocessors that a fixed split must fill
_CLUSTERS = ("90", "100")  # architectures whose blocks can write to each other's shared memory


@dataclass(frozen=True)
class Variant:
    """One way to build the decode kernel.

    Attributes
    ----------
    source : file of `kernels/`, without its ending.
    arch : compute capability, '90'.
    macros : macros of the build.
    """

    source: str
    arch: str
    macros: tuple[tuple[str, int], ...]

    def __getitem__(self, name: str) -> int:
        return dict(self.macros)[name]

    @property
    def rows(self) -> int:
        """Query heads that one pass holds."""
        if "TILES" in dict(self.macros):
            return _HEADS_OF_MMA_TILE * self["TILES"]
        return (self["TILE"] if "TILE" in dict(self.macros) else _HEADS_OF_MMA_TILE) * self["QTILES"]

    def passes(self, group: int) -> int:
        """Return the passes over the `group` query heads of a KV head."""
        return -(-group // self.rows)

    @property
    def splits(self) -> int:
        """Blocks that attend to one KV head; 0 if blocks share out the work that they find."""
        return self["SPLITS"] if self.source == "decode_split" else 0

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * dict(self.macros).get("WARPS", _WARPS)

    @property
    def uses_split_kv_buffer(self) -> bool:
        """Whether its blocks merge their partial results through `Scratch.split_kv_buffer`."""
        return self.source == "decode_pages" and self["FIXED"] == 1

    @property
    def paged(self) -> bool:
        """Whether cold tokens are stored in pages, K and V in formats of their own, rather than in rows of one format."""
        return self["COLD_TYPE"] == _COLD_PAGES

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return dict(self.macros).get("SHARED_BYTES", 0)

    def compiled(self) -> Compiled:
        """Compile the variant, or load it from the disk cache."""
        return compile_source(self.source, self.arch, dict(self.macros))

    def fixed(self) -> "Variant | None":
        """Return the variant that gives every KV head equally many blocks; None if there is none."""
        if self.source != "decode_pages":
            return None
        return Variant(self.source, self.arch, _macros(dict(self.macros) | {"FIXED": 1}))

    def storing(self, rotate: str = "") -> "Variant":
        """Return the variant of the storing kernels for the same cache, which rotate what a recipe's `rotate` names."""
        names = ("HEAD_DIM", "EXACT_TYPE", "COLD_TYPE", *(("K_FORMAT", "V_FORMAT", "V_GROUP") if self.paged else ()))
        rotated = (("ROTATED", _ROTATED[rotate]),) if rotate else ()
        return Variant("append", self.arch, (*((n, self[n]) for n in names), *_ONE_QUERY_TILE, ("WARPS", 8), *rotated))

    def selecting_blocks(self) -> "Variant":
        """Return the variant of the kernel that selects pages in a serving engine's blocks."""
        names = ("HEAD_DIM", "EXACT_TYPE", "COLD_TYPE", "K_FORMAT", "SCORER")
        unread = {"V_FORMAT": _PAGE_FORMATS["bf16"], "V_GROUP": self["HEAD_DIM"]}
        macros = {name: self[name] for name in names} | unread | dict(_ONE_QUERY_TILE)
        blocks = 3 if self["HEAD_DIM"] <= 128 else 2  # of a multiprocessor, by the registers
        return Variant("select_blocks", self.arch, _macros(macros, WARPS=8, MIN_BLOCKS=blocks))

    def storing_blocks(self) -> "Variant":
        """Return the variant of the kernels that store and read pages in a serving engine's blocks."""
        return Variant("store_blocks", self.arch, self.storing().macros)

    def editing(self, rotate: str = "") -> "Variant":
        """Return the variant of the kernels that serve a model in addition to decode steps, with the rotation of `storing`."""
        return Variant("edit", self.arch, self.storing(rotate).macros)

    def rotating(self) -> "Variant":
        """Return the variant of the kernel that rotates outputs back."""
        unread = {"EXACT_TYPE": TYPES["bf16"], "COLD_TYPE": _COLD_NONE}
        return Variant("rotate", self.arch, _macros({"HEAD_DIM": self["HEAD_DIM"]} | unread | dict(_ONE_QUERY_TILE), WARPS=8))

    def selecting(self) -> "Variant":
        """Return the variant of the selecting kernel for the same cache; it reads only the scales of the keys."""
        names = ("HEAD_DIM", "COLD_TYPE", "K_FORMAT", "SCORER")
        unread = {"EXACT_TYPE": TYPES["bf16"], "V_FORMAT": _PAGE_FORMATS["bf16"], "V_GROUP": self["HEAD_DIM"]}
        macros = {name: self[name] for name in names} | unread | dict(_ONE_QUERY_TILE)
        return Variant("select", self.arch, _macros(macros, WARPS=8, MIN_BLOCKS=3))


def decode_variant(head_dim: int, group: int, dtype: str, recipe: Recipe, arch: str, kind: str = "auto") -> Variant:
    """Return the decode kernel for these parameters.

    `kind` forces 'mma', 'simt' (the kernels for older devices, which run everywhere) or 'pages' (otherwise only for recipes
    that require it).

    Raises
    ------
    UsageError : if no kernel supports the combination.
    """
    if recipe.uses_hessians:
        raise UsageError(f"rounding={recipe.rounding} has no CUDA kernel: leave it out of {recipe}, or use the cpu backend")
    exact = TYPES[recipe.exact_dtype(dtype)]
    cold = _COLD_NONE if recipe.is_dense else _COLD_INT8 if recipe.key_format == "int8" else _COLD_SAME
    can_mma = int(arch) >= MMA_SINCE and exact != TYPES["fp32"]
    if kind == "mma" and not can_mma:
        raise UsageError(f"the tensor-core kernel needs 16-bit rows and SM 8.0; this is {dtype}, {recipe} on SM {arch}")
    common = {"HEAD_DIM": head_dim, "EXACT_TYPE": exact, "COLD_TYPE": cold, "REUSE": int(recipe.selection == "reuse")}
    if requires_pages(recipe) or kind == "pages":
        return _pages_variant(common, group, recipe, arch, can_mma and kind != "simt")
    if can_mma and kind != "simt":
        tiles = _tiles(group, _HEADS_OF_MMA_TILE, 4 if head_dim <= 128 else 2)
        # One large block per multiprocessor leaves the fewest partial results to merge.
        blocks = 1
        warps = 8
        if head_dim > 128:  # shared memory has room for the results of four warps
            warps, blocks = 4, 2
        elif head_dim <= 64 and cold != _COLD_INT8:  # short rows are bound by latency: fewer warps to merge
            warps, blocks = 4, 3
        return Variant("decode_mma", arch, _macros(common, QTILES=tiles, WARPS=warps, MIN_BLOCKS=blocks))
    chunk = 16 if cold == _COLD_INT8 else 4 if exact == TYPES["fp32"] else 8
    words = -(-head_dim // (8 * chunk)) * chunk
    tile = min(max(32 // words, 1), 4, 1 << (group - 1).bit_length())
    return Variant("decode_simt", arch, _macros(common, QTILES=_tiles(group, tile, 4), WARPS=4, MIN_BLOCKS=2, TILE=tile))


def blocks_variant(head_dim: int, group: int, dtype: str, recipe: Recipe, arch: str) -> Variant:
    """Return the kernel that attends to the blocks of a serving engine, of a recipe that reads every page or listed ones.

    Raises
    ------
    UsageError : if no kernel supports the combination.
    """
    if recipe.selection not in ("all", "pages"):
        raise UsageError(f"{recipe} reads no pages of a serving engine's blocks: use formats, with or without pages=")
    if int(arch) < MMA_SINCE or dtype == "fp32":
        raise UsageError(f"a serving engine's blocks need SM 8.0 and a 16-bit dtype; this is {dtype} on SM {arch}")
    if recipe.exact_dtype(dtype) != dtype:
        raise UsageError(
            f"{recipe} stores recent tokens in {recipe.exact_dtype(dtype)}; a serving engine stores them in {dtype}"
        )
    return Variant("decode_blocks", arch, decode_variant(head_dim, group, dtype, recipe, arch, "pages").macros)


def stored_recipe_for(recipe: Recipe, shape: AttentionShape, capacity: int, dtype: str, arch: str) -> Recipe:
    """Return the recipe by which tokens are stored: 16-bit pages for large dense caches, which bulk copies read faster."""
    size = 4 * shape.batch * shape.kv_heads * shape.head_dim * capacity
    if not recipe.is_dense or dtype == "fp32" or int(arch) < _BULK_SINCE or size < _DENSE_PAGES_FROM:
        return recipe
    return Recipe(dtype, dtype, sinks=0, window=0)


def gains_from_pages(recipe: Recipe, shape: AttentionShape, arch: str, multiprocessors: int) -> bool:
    """Return whether int8 is read faster from pages than from rows.

    It is where keys are the rows of the product, and else with few blocks for each KV head, all of them busy.
    """
    if not recipe.key_format == recipe.value_format == "int8" or recipe.selection != "all" or int(arch) < _BULK_SINCE:
        return False
    heads = shape.batch * shape.kv_heads
    return shape.group <= KEYS_AS_ROWS_MOST_HEADS or (heads >= _PAGED_INT8_FROM and bool(fixed_blocks(heads, multiprocessors)))


def requires_pages(recipe: Recipe) -> bool:
    """Return whether a recipe needs pages: for scales per page, different formats of K and V, or a selection of pages."""
    by_row = recipe.key_format is None or FORMATS[recipe.key_format].cuda_rows
    return recipe.key_format != recipe.value_format or not by_row or recipe.selection == "pages"


def _pages_variant(common: dict[str, int], group: int, recipe: Recipe, arch: str, mma: bool) -> Variant:
    head_dim = common["HEAD_DIM"]
    common = common | {
        "COLD_TYPE": _COLD_PAGES,
        "K_FORMAT": _page_format(recipe.key_format, False),
        "V_FORMAT": _page_format(recipe.value_format, True),
        "V_GROUP": recipe.v_group(head_dim) if _value_layout(recipe) is ScaleLayout.GROUP else head_dim,
        "SELECT": int(recipe.selection == "pages"),
        "QTILES": 1,
        "MIN_BLOCKS": 1,
    }
    if recipe.selection == "pages":
        common["SCORER"] = _scorer_macro(recipe)
    if not mma:
        tile = min(max(32 * 8 // head_dim, 1), 4, 1 << (group - 1).bit_length())
        return Variant("decode_pages_simt", arch, _macros(common, WARPS=4, TILE=tile))
    tiles = 2 if group > _HEADS_OF_MMA_TILE and head_dim <= 128 else 1
    common["KEYS_AS_ROWS"] = int(group <= KEYS_AS_ROWS_MOST_HEADS)
    limit = _SHARED_BYTES.get(arch, _LEAST_SHARED_BYTES)
    narrow = _PAGE_FORMATS["bf16"] not in (common["K_FORMAT"], common["V_FORMAT"])
    if narrow and limit == _SHARED_BYTES["90"]:
        limit -= _NEXT_KERNEL_BYTES
    for warps, stages in _RINGS:
        if narrow and warps * (stages - 1) * _stage_bytes(common) >= _IN_FLIGHT_BYTES:
            continue
        shared = _pages_shared_bytes(common, warps, tiles, stages)
        if shared + _STATIC_SHARED_BYTES <= limit:
            return Variant(
                "decode_pages", arch, _macros(common, WARPS=warps, TILES=tiles, STAGES=stages, FIXED=0, SHARED_BYTES=shared)
            )
    raise UsageError(f"SM {arch} has too little shared memory for {recipe} and heads of {head_dim}: use kind='simt'")


def _value_layout(recipe: Recipe) -> ScaleLayout | None:
    return FORMATS[str(recipe.value_format)].values


def _page_format(name: str | None, value: bool) -> int:
    if name not in _PAGE_FORMATS:
        fitting = [f for f in _PAGE_FORMATS if not value or FORMATS[f].values is not None]
        raise UsageError(f"format {name} has no CUDA kernel: choose {', '.join(fitting)}, or the cpu backend")
    return _PAGE_FORMATS[name]


def _scorer_macro(recipe: Recipe) -> int:
    scorer = scorer_of(recipe)
    if scorer.cuda_id is None:
        built = ", ".join(name for name, other in SCORERS.items() if other.cuda_id is not None)
        raise UsageError(f"page scorer {scorer.name} has no CUDA kernel: choose {built}, or the cpu backend")
    return scorer.cuda_id


_SHARED_BYTES = {"80": 163 << 10, "87": 163 << 10, "90": 227 << 10, "100": 227 << 10, "103": 227 << 10}
_NEXT_KERNEL_BYTES = 44 << 10  # of a block of append or select, which must fit together with one of decode
_LEAST_SHARED_BYTES = 99 << 10
_STATIC_SHARED_BYTES = 256
_IN_FLIGHT_BYTES = 110 << 10  # of loads: another stage gains nothing
_RINGS = ((8, 4), (8, 3), (8, 2), (4, 4), (4, 3), (4, 2), (2, 3), (2, 2), (1, 2))  # warps of a block, stages of each


def _stage_bytes(macros: dict[str, int]) -> int:
    """Return the size of a stage of a ring, which holds a page."""
    dim = macros["HEAD_DIM"]
    key, value = format_of(macros["K_FORMAT"]), format_of(macros["V_FORMAT"])
    codes = PAGE_TOKENS * (key.key_row_bytes(dim) + value.row_bytes(dim))
    scales = (key.key_scales(dim).bytes_of(PAGE_TOKENS), value.value_scales(dim, macros["V_GROUP"]).bytes_of(PAGE_TOKENS))
    return round_up(codes + sum(round_up(n_bytes, 16) for n_bytes in scales), PAGE_ALIGNMENT_BYTES)


def _pages_shared_bytes(macros: dict[str, int], warps: int, tiles: int, stages: int) -> int:
    """Return the size of `Shared` of page_shared.cuh, which asserts it."""
    dim, key = macros["HEAD_DIM"], format_of(macros["K_FORMAT"])
    queries = _HEADS_OF_MMA_TILE * tiles
    vectors = query_vectors(key, dim, macros["KEYS_AS_ROWS"] == 1)
    results = KEYS_AS_ROWS_MOST_HEADS if macros["KEYS_AS_ROWS"] else queries
    sums = warps * (results // 2 * (2 * dim + 8) * 4 + results * 8)
    operands = tiles * (round_up(dim, 32) // 16 + vectors) * 32 * 16
    return round_up(warps * stages * (_stage_bytes(macros) + 8) + sums + operands + queries * 4, 16)


def parts_of_selection(pages: int, heads: int, multiprocessors: int) -> int:
    """Return the blocks that score one head's pages in a serving engine, which need not all run at once."""
    return max(1, min(-(-pages // 64), _SELECTING_AT_ONCE * multiprocessors // heads))


def selecting_blocks(page_capacity: int, heads: int, multiprocessors: int) -> int:
    """Return the blocks that score one head's pages; they run at once, together with append's if half the device is left."""
    spare = multiprocessors - 2 * heads
    at_once = spare if 2 * spare >= multiprocessors else multiprocessors
    return max(1, min(-(-page_capacity // 64), at_once // heads))


def overlapping(variant: Variant) -> Variant:
    """Return the build for blocks that each serve several KV heads; `variant` itself if none is better.

    Between two heads an int8 block merges and reads nothing; of two half-sized blocks per multiprocessor, one reads then.
    """
    if (
        variant.source != "decode_mma"
        or variant["COLD_TYPE"] != _COLD_INT8
        or variant["HEAD_DIM"] > 128
        or variant["QTILES"] > 1
    ):
        return variant
    return Variant(variant.source, variant.arch, _macros(dict(variant.macros) | {"WARPS": 4, "MIN_BLOCKS": 2}))


@dataclass(frozen=True)
class Split:
    """A fixed number of blocks per KV head: one cluster, or blocks that merge through scratch memory."""

    blocks: int
    cluster: bool = False


def split_variant(variant: Variant, group: int, split: Split) -> Variant | None:
    """Return the kernel of a fixed split that replaces `variant`; None if there is none."""
    if variant.source != "decode_mma" or variant["HEAD_DIM"] > 128 or variant["REUSE"] or group > _HEADS_OF_MMA_TILE:
        return None
    cluster = split.cluster and variant.arch in _CLUSTERS
    macros = dict(variant.macros) | {"QTILES": 1, "WARPS": _SPLIT_WARPS, "MIN_BLOCKS": 1}
    prefetched = 1 if split.cluster else 2
    return Variant(
        "decode_split", variant.arch, _macros(macros, SPLITS=split.blocks, CLUSTER=int(cluster), PREFETCH=prefetched)
    )


def fixed_blocks(problems: int, multiprocessors: int) -> int | None:
    """Return the blocks of a grid with equally many per problem, all running at once; None if too many would be idle."""
    blocks = multiprocessors // problems * problems
    return blocks if blocks >= _LEAST_BUSY * multiprocessors else None


def plan_splits(batch: int, kv_heads: int, units: int, int8: bool, multiprocessors: int) -> tuple[Split, ...]:
    """Return the fixed splits for sequences of up to `units` units per KV head, best first; may be empty.

    All blocks must run at once, so there are at most as many as multiprocessors. Short contexts are bound by latency: clusters
    merge fastest. One long int8 sequence gains from a fixed split that fills the device; with different lengths blocks would
    be idle.
    """
    heads = batch * kv_heads
    fits = [n for n in (2 * LARGEST_CLUSTER, LARGEST_CLUSTER, 4, 2) if n * heads <= multiprocessors]
    short = [Split(n, True) for n in fits if n <= LARGEST_CLUSTER and units <= n * _SPLIT_WARPS * _MOST_ROUNDS]
    full = [Split(n) for n in fits if batch == 1 and int8 and n * heads >= _LEAST_BUSY * multiprocessors]
    return (*short, *full)


def _tiles(group: int, rows: int, most: int) -> int:
    tiles = 1
    while tiles < most and tiles * rows < group:
        tiles *= 2
    return tiles


def _macros(common: dict[str, int], **others: int) -> tuple[tuple[str, int], ...]:
    return tuple(sorted((common | others).items()))


def ceilings_variant(arch: str, unroll: int = 4) -> Variant:
    """Return the build of the kernels that measure the device's limits."""
    return Variant("ceilings", arch, (("TENSOR", int(int(arch) >= MMA_SINCE)), ("UNROLL", unroll)))
