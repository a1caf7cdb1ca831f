"""Every CUDA kernel on small shapes under compute-sanitizer: memcheck, racecheck, initcheck and synccheck.

    python benchmarks/sanitize.py --output benchmarks/results/h100/sanitizer.json [--tools memcheck,racecheck] [--jobs 8]

A case is one kind of kernel with one recipe, in a process of its own under each tool: filled, appended to until a page has left
the window, decoded against the float64 oracle; a chunk behind it, its rows moved, read back and cropped within the window and
far behind it; then a short inference cycle, whose kernels overlap. `blocks` are the kernels over a serving engine's blocks:
a chunk and steps of one token are stored and decoded, by listed pages where the recipe selects, tokens gathered, and a NaN
reported. The file holds what each tool said of each case.
"""

import argparse
import datetime
import itertools
import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from elastickv.backends.cuda.builds import RECIPES, ROTATED, recipe_for
from elastickv.backends.cuda.kernel_selection import KEYS_AS_ROWS_MOST_HEADS, requires_pages
from elastickv.backends.feedback import Feedback
from elastickv.kvcache import Oracle
from elastickv.kvcache.error_metrics import relative_l2
from elastickv.kvcache.quantize import stored_values
from elastickv.kvcache.rounding import from_bf16_bits, rounded, to_bf16_bits
from elastickv.kvcache.tensor_view import TensorView
from elastickv.recipe import PAGE_TOKENS, AttentionShape, Recipe

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
BARRIERS = 1 << 13  # that synccheck tracks; a launch fails where a kernel's blocks have more between them
OPERAND_ROUNDING = {"bf16": 4e-3, "fp16": 4e-3, "fp32": 1e-5}
DENSE_PAGES = ("bf16", "fp16,window=0", "int8")  # what also runs from rows, here from pages
# Batch, query heads, KV heads, head_dim, and the model's dtype.
TURNS = (
    ((2, 8, 2, 128), "bf16"),
    ((2, 6, 2, 80), "fp16"),
    ((2, 9, 1, 64), "bf16"),
    ((2, 2, 2, 96), "fp32"),
    ((2, 8, 1, 256), "fp16"),
    ((2, 18, 2, 112), "bf16"),
    ((2, 4, 1, 192), "fp32"),
)
# Two tokens before a page leaves the window; of the second row before one is full.
EQUAL, RAGGED = (290, 290), (290, 162)
SERVED_WINDOW, SERVED_BLOCK, SERVED_STEPS = 64, 8, 4
SERVED_SHARE, SERVED_ANCHORS = 0.5, 2  # of the pages that are read, and steps from one selection to the next
SKIPPED = 7  # tokens at the start that are not gathered


@dataclass(frozen=True)
class Case:
    """A kernel with a recipe on a shape: what one process runs.

    Attributes
    ----------
    kernel, macros : what `CudaBackend` is told to build; `ceilings` are the kernels that measure the device's limits, `blocks`
        those over a serving engine's blocks.
    shape : batch, query heads, KV heads, head_dim.
    lengths : tokens of each row.
    """

    kernel: str
    macros: dict[str, int]
    recipe: str
    shape: tuple[int, int, int, int]
    dtype: str
    lengths: tuple[int, ...]


def matrix() -> list[Case]:
    """Return every kernel with every recipe that it runs, shapes and dtypes in turn."""
    planned: list[tuple[str, dict[str, int], str, tuple[int, ...]]] = []
    paged = [("pages", text, EQUAL) for text in DENSE_PAGES]
    for text in RECIPES:
        if requires_pages(recipe_for(text, 64)):
            paged += [("auto", text, EQUAL), ("auto", text, RAGGED)]
            planned.append(("simt", {}, text, RAGGED))
            continue
        planned += [("simt", {}, text, EQUAL), ("mma", {"SPLITS": 0}, text, RAGGED)]
        if "reuse" not in text:
            planned += [("mma", {"SPLITS": 8}, text, EQUAL), ("mma", {"SPLITS": 4, "CLUSTER": 0}, text, RAGGED)]
    for text in ROTATED:
        kernel, macros = ("auto", {}) if requires_pages(recipe_for(text, 64)) else ("mma", {"SPLITS": 0})
        planned.append((kernel, macros, f"{text},rotate=kv", RAGGED))
    cases, turns = [], itertools.cycle(TURNS)
    for kernel, macros, text, lengths in planned:
        shape, dtype = next((s, d) for s, d in turns if runs(kernel, macros, text, s, d))
        cases.append(Case(kernel, macros, str(recipe_for(text, shape[3])), shape, dtype, lengths))
    paged += [("blocks", text, RAGGED) for text in RECIPES if in_blocks(text)]
    for (kernel, text, lengths), keys_as_rows in itertools.product(paged, (True, False)):
        shape, dtype = next((s, d) for s, d in turns if runs_on_tensor_cores(kernel, text, s, d, keys_as_rows))
        cases.append(Case(kernel, {}, str(recipe_for(text, shape[3])), shape, dtype, lengths))
    # More KV heads than multiprocessors: blocks that serve one head after the other.
    cases.append(Case("mma", {"SPLITS": 0}, "int8", (34, 16, 4, 64), "bf16", EQUAL * 17))
    cases.append(Case("auto", {}, "int4,pages=1/4:1/3,anchor_every=2", (2, 8, 2, 64), "bf16", RAGGED))
    return [*cases, Case("ceilings", {}, "", (1, 1, 1, 64), "bf16", (1,))]


def runs(kernel: str, macros: dict[str, int], text: str, shape: tuple[int, int, int, int], dtype: str) -> bool:
    """Whether a kernel serves a recipe on a shape: tensor cores take 16 bits, fixed splits up to 8 heads of up to 128."""
    _, query_heads, kv_heads, head_dim = shape
    if kernel in ("mma", "pages") and recipe_for(text, head_dim).exact_dtype(dtype) == "fp32":
        return False
    return not macros.get("SPLITS") or (head_dim <= 128 and query_heads <= 8 * kv_heads)


def in_blocks(text: str) -> bool:
    """Whether a serving engine's blocks can store a recipe."""
    recipe = recipe_for(text, 64)
    return recipe.selection in ("all", "pages") and not recipe.is_dense


def runs_on_tensor_cores(kernel: str, text: str, shape: tuple[int, int, int, int], dtype: str, keys_as_rows: bool) -> bool:
    """Whether a kernel over pages uses tensor cores on a shape, with the keys or with the queries as rows of its products."""
    _, query_heads, kv_heads, head_dim = shape
    exact = recipe_for(text, head_dim).exact_dtype(dtype)
    served = dtype if kernel == "blocks" else exact
    return exact == served != "fp32" and (query_heads <= KEYS_AS_ROWS_MOST_HEADS * kv_heads) == keys_as_rows


CASES = matrix()


def run_case(number: int) -> None:
    """Run one case in this process; exits with a line where a result is wrong."""
    from elastickv.backends.cuda.backend import CudaBackend

    case = CASES[number]
    if case.kernel == "ceilings":
        measure_little()
        return
    if case.kernel == "blocks":
        serve(case)
        return
    recipe, shape, rng = Recipe.parse(case.recipe), AttentionShape(*case.shape), np.random.default_rng(0)
    lengths, limit = case.lengths, OPERAND_ROUNDING[recipe.exact_dtype(case.dtype)]
    backend, capacity = CudaBackend(None, case.kernel, case.macros), max(lengths) + 60
    cache = backend.cache(shape, capacity, case.dtype, recipe)
    cache.prefill(*tokens(rng, shape, max(lengths)), np.array(lengths))
    queries = rng.standard_normal((shape.batch, shape.query_heads, shape.head_dim), dtype=np.float32)

    def decode(changed, oracle) -> None:
        changed.append(*(t[:, :, 0] for t in tokens(rng, shape, 1)))
        error = relative_l2(changed.decode(queries)[0], oracle.decode(queries)[0]).max()
        if not error <= limit:
            sys.exit(f"kernel error {error:.1e}")

    oracle = Oracle(cache)
    for _ in range(4):
        decode(cache, oracle)
    cache.extend(*tokens(rng, shape, 40), np.full(shape.batch, 40))
    moved = cache.gather(np.arange(shape.batch)[::-1].copy(), capacity)
    before = cache.read(0, capacity)
    moved.crop(moved.lengths - 3)
    for now, was in zip(moved.read(0, capacity), before, strict=True):
        for row, length in enumerate(moved.lengths):
            if not np.array_equal(now[row, :, :length], was[shape.batch - 1 - row, :, :length]):
                sys.exit("rows differ after they moved")
    if recipe.stride == 1:
        moved.crop(np.maximum(moved.lengths - 140, 1))
    decode(moved, Oracle(moved))
    moved.raise_non_finite()

    caches = [backend.cache(shape, capacity, case.dtype, recipe) for _ in range(2)]
    for cache in caches:
        cache.prefill(*tokens(rng, shape, max(lengths)), np.array(lengths))
    backend.cycle(caches, queries, Feedback.seeded(shape.head_dim, 1, 1.0, 1.0, 1.0), True).run(4)


def serve(case: Case) -> None:
    """Store and decode requests in a serving engine's blocks, gather them from there, and have a NaN reported."""
    from elastickv.backends.bad_token import NO_BAD_TOKEN, BadToken
    from elastickv.backends.cuda.block_arguments import BlocksArguments, GatherRows, PageListArguments, StepRows
    from elastickv.backends.cuda.block_kernels import BlockKernels
    from elastickv.backends.cuda.device import CudaDevice

    recipe, (batch, query_heads, kv_heads, dim), rng = Recipe.parse(case.recipe), case.shape, np.random.default_rng(0)
    device, allocations, columns = CudaDevice(None), [], -(-max(case.lengths) // PAGE_TOKENS)
    kernels = BlockKernels(device, AttentionShape(*case.shape), case.dtype, recipe, SERVED_WINDOW, columns)

    def sent(array):
        allocations.append(device.allocate(array.nbytes))
        device.upload(allocations[-1], array)
        return allocations[-1]

    def rows(array):
        bits = to_bf16_bits(array) if case.dtype == "bf16" else array.astype(np.float16)
        return TensorView(sent(bits).pointer, case.dtype, array.shape, (array.shape[1] * dim, dim, 1))

    page_table = 1 + rng.permutation(batch * columns).astype(np.int32).reshape(batch, columns)
    window_columns = columns * PAGE_TOKENS // SERVED_BLOCK
    window_table = 1 + rng.permutation(batch * window_columns).astype(np.int32).reshape(batch, window_columns)
    slab, window_block = kernels.slab.n_bytes, kv_heads * SERVED_BLOCK * 2 * dim * 2
    blocks = BlocksArguments(
        pages=device.allocate((page_table.size + 1) * kv_heads * slab),
        window=device.allocate((window_table.size + 1) * window_block, 0),
        page_table=sent(page_table),
        window_table=sent(window_table),
        page_stride=kv_heads * slab,
        window_stride=window_block,
        kv_heads=kv_heads,
        slab_bytes=slab,
        page_columns=columns,
        window_columns=window_columns,
        window_shift=SERVED_BLOCK.bit_length() - 1,
    )
    stored = [rounded(rng.standard_normal((2, n, kv_heads, dim), dtype=np.float32), case.dtype) for n in case.lengths]
    first, bad = sent(np.zeros(batch, np.int32)), sent(np.full(batch, NO_BAD_TOKEN, np.int64))
    before, lists = [0] * batch, None
    if recipe.selection == "pages":
        lists = PageListArguments(
            request_indices=sent(np.arange(batch, dtype=np.int32)[::-1].copy()),
            prompts=sent(np.array(case.lengths, np.int32) - SERVED_STEPS),
            ratio_numbers=sent(np.zeros(batch, np.int32)),
            fractions=sent(np.full((1, kv_heads), SERVED_SHARE)),
            headers=sent(np.full((batch, kv_heads, 4), -1, np.int32)),
            page_lists=device.allocate(batch * kv_heads * columns * 2),
            anchor_every=SERVED_ANCHORS,
            anchor_offset=0,
            ring=1,
            list_capacity=columns,
        )
    for left in range(SERVED_STEPS, -1, -1):
        after = [n - left for n in case.lengths]
        parts = [s[:, n:m] for s, n, m in zip(stored, before, after, strict=True)]
        keys, values = (np.concatenate([part[i] for part in parts]) for i in range(2))
        tokens_of = [np.arange(n, m) for n, m in zip(before, after, strict=True)]
        slots = [t[u // SERVED_BLOCK] * SERVED_BLOCK + u % SERVED_BLOCK for t, u in zip(window_table, tokens_of, strict=True)]
        starts = np.cumsum([0, *map(len, tokens_of)]).astype(np.int32)
        step, lengths = StepRows.of(rows(keys), rows(values)), sent(np.array(after, np.int32))
        where = lengths, sent(starts), sent(np.concatenate(slots).astype(np.int64)), bad
        kernels.store(blocks, step, *where, batch, max(map(len, tokens_of)))
        if before[0]:
            query = rounded(rng.standard_normal((batch, query_heads, dim), dtype=np.float32), case.dtype)
            output = device.allocate(2 * query.size)
            kernels.decode(blocks, step, rows(query), output, lengths, first, lists=lists)
        before = after
    read = device.download(output, query.shape, np.uint16)
    answers = from_bf16_bits(read) if case.dtype == "bf16" else read.view(np.float16)
    unread = [[()] * kv_heads] * batch
    if lists is not None:
        headers = device.download(lists.headers, (batch, kv_heads, 4), np.int32)[::-1]
        listed = device.download(lists.page_lists, (batch, kv_heads, columns), np.uint16)[::-1]
        unread = [
            [np.setdiff1d(range(header[3]), pages[: header[2]]) for header, pages in zip(*each, strict=True)]
            for each in zip(headers, listed, strict=True)
        ]
        if not all(len(pages) for each in unread for pages in each):
            sys.exit("nothing was selected")
    for number, n in enumerate(case.lengths):
        expected = attended(query[number], stored[number], n - SERVED_WINDOW, recipe, unread[number])
        error = relative_l2(answers[number].astype(np.float64), expected).max()
        if not error <= 3 * OPERAND_ROUNDING[case.dtype]:  # the output is rounded too
            sys.exit(f"decode in blocks differs from the oracle by {error:.3g}")
    # From the middle of a page to the end, the newest tokens from the window.
    counts, skipped = np.array(case.lengths, np.int32) - SKIPPED, np.full(batch, SKIPPED, np.int32)
    ends = np.cumsum(counts).astype(np.int32)
    oldest = sent(skipped + counts - SERVED_WINDOW)
    wanted = GatherRows(first=sent(skipped), count=sent(counts), start=sent(ends - counts), exact_first=oldest, first_request=0)
    gathered = [device.allocate(2 * int(ends[-1]) * kv_heads * dim) for _ in range(2)]
    kernels.gather(blocks, wanted, *gathered, batch, int(counts.max()))
    for which, memory in enumerate(gathered):
        read = device.download(memory, (int(ends[-1]), kv_heads, dim), np.uint16)
        numbers = (from_bf16_bits(read) if case.dtype == "bf16" else read.view(np.float16)).astype(np.float64)
        expected = [held(s, n - SERVED_WINDOW, recipe)[which, SKIPPED:n] for s, n in zip(stored, case.lengths, strict=True)]
        error = relative_l2(numbers, np.concatenate(expected)).max()
        if not error <= OPERAND_ROUNDING[case.dtype]:
            sys.exit(f"gathered rows differ from the oracle by {error:.3g}")
    if (device.download(bad, (batch,), np.int64) != NO_BAD_TOKEN).any():
        sys.exit("a finite token was reported")
    keys[-1, 0, 1] = np.nan
    kernels.store(blocks, StepRows.of(rows(keys), rows(values)), *where, batch, 1)
    if BadToken.of(int(device.download(bad, (batch,), np.int64)[-1])) != BadToken(0, case.lengths[-1] - 1, False):
        sys.exit("NaN was not reported")


def held(stored, cold: int, recipe: Recipe):
    """Return the numbers of a request's keys and values, of which the first `cold` are read from pages."""
    numbers, pages = stored.astype(np.float64), -(-cold // PAGE_TOKENS) * PAGE_TOKENS
    for which, fmt in enumerate((recipe.key_format, recipe.value_format)):
        for head in range(stored.shape[2]):
            whole = stored_values(stored[which, :pages, head], fmt, bool(which), recipe.v_group(stored.shape[3]))
            numbers[which, :cold, head] = whole[:cold]
    return numbers


def attended(query, stored, cold: int, recipe: Recipe, unread):
    """Return float64 attention of a request's queries to keys and values of which the first `cold` are read from pages.

    `unread` are the pages that each KV head does not read.
    """
    kv_heads, dim = stored.shape[2:]
    numbers = held(stored, cold, recipe)
    grouped = query.astype(np.float64).reshape(kv_heads, -1, dim)
    scores = np.einsum("hgd,khd->hgk", grouped, numbers[0]) / dim**0.5
    for head, pages in enumerate(unread):
        for page in pages:
            scores[head, :, page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hgk,khd->hgd", weights / weights.sum(-1, keepdims=True), numbers[1]).reshape(query.shape)


def measure_little() -> None:
    """Run the kernels that measure the device's limits on a megabyte."""
    from elastickv.backends.cuda import ceilings
    from elastickv.backends.cuda.backend import CudaBackend

    ceilings._MOST_BYTES = 1 << 20
    ceilings.measure(CudaBackend(None)._device)


def tokens(rng, shape, count):
    """Return random keys and values, (2, batch, kv_heads, count, head_dim)."""
    return rng.standard_normal((2, shape.batch, shape.kv_heads, count, shape.head_dim), dtype=np.float32)


def watch(sanitizer: str, tool: str, number: int, limit_s: float, latest: float) -> dict:
    """Run one case under one tool, unless it is too late to begin."""
    case = {"tool": tool} | asdict(CASES[number])
    start = time.monotonic()
    if start > latest:
        return case | {"clean": None, "summary": "left out: the time was up"}
    options = ["--tool", tool, "--error-exitcode", "9"]
    if tool == "synccheck":
        options += ["--num-cuda-barriers", str(BARRIERS)]
    command = [sanitizer, *options, sys.executable, __file__, "--case", str(number)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return case | {"clean": None, "summary": f"not finished after {limit_s:g} s"}
    lines = (run.stdout + run.stderr).splitlines()
    said = [line.strip("= ") for line in lines if "SUMMARY" in line]
    case |= {"clean": run.returncode == 0, "summary": "; ".join(said), "seconds": round(time.monotonic() - start, 1)}
    return case if case["clean"] else case | {"exit": run.returncode, "lines": lines[:60]}


def main() -> None:
    """Run the tools and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--jobs", type=int, default=8, help="processes at once")
    parser.add_argument("--case-limit", type=float, default=200.0, help="seconds a case")
    parser.add_argument("--time-limit", type=float, default=900.0, help="seconds after which no case begins")
    parser.add_argument("--case", type=int, help="run this case in this process, without a tool")
    options = parser.parse_args()
    if options.case is not None:
        run_case(options.case)
        return
    sanitizer = shutil.which("compute-sanitizer")
    if not sanitizer or not options.output:
        sys.exit("compute-sanitizer of the CUDA toolkit must be on the PATH, and --output name a file")
    from elastickv.backends import load
    from elastickv.benchmark.environment import environment

    device = load("cuda")[0].device
    runs = list(itertools.product(options.tools.split(","), range(len(CASES))))
    latest = time.monotonic() + options.time_limit
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(lambda run: watch(sanitizer, *run, options.case_limit, latest), runs))
    for row in rows:
        print(row["tool"], row["kernel"], row["recipe"], "clean" if row["clean"] else "NOT CLEAN", row["summary"], flush=True)
    file = {
        "date_utc": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "device": device.name,
        "driver": device.driver,
    }
    file |= {"clean": sum(row["clean"] is True for row in rows), "runs": len(rows), "cases": rows, "environment": environment()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(file, indent=1, default=str) + "\n")


if __name__ == "__main__":
    from command_line import exit_with

    exit_with(main)
