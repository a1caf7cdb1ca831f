"""The figures of several GPUs: by serving.py and tensor_parallel.py, and by the byte counts of large models."""

import json
from dataclasses import dataclass, replace

from serving_figures import NOTHING, RESULTS, serving_of

from elastickv.model_benchmark.shapes import SHAPES
from elastickv.recipe import AttentionShape, Recipe, stored_bytes
from elastickv.recipe.byte_counts import dense_bytes, interval_bytes
from elastickv.recipe.solver import with_pages

SERVING = "h200x2/serving-tp2.json"
RANKS = "h200x2/tensor_parallel.json"
CONTEXT = 131072
REQUESTS = 8
SHARE_OF_MEMORY = 0.9  # that vLLM takes of a GPU, of which activations are a small part
SERVED = Recipe.parse("int4,sinks=0,window=128")
RATIOS = (4, 8)


@dataclass(frozen=True)
class Machines:
    """How a model is split.

    Attributes
    ----------
    shape : name of the model's shape.
    tensor, pipeline : vLLM's sizes; their product is the number of GPUs.
    memory : of a GPU, GB.
    """

    shape: str
    tensor: int
    pipeline: int
    memory: int


MACHINES = (
    Machines("8b", 1, 1, 80),
    Machines("8b", 2, 1, 80),
    Machines("70b", 4, 1, 80),
    Machines("70b", 8, 1, 80),
    Machines("405b", 8, 1, 141),
    Machines("405b", 8, 2, 80),
)


def parallel_serving() -> list[str]:
    """Return the figures of vLLM on two GPUs."""
    return serving_of(SERVING)


def parallel_ranks() -> list[str]:
    """Return ms a token of Transformers on one GPU and on two."""
    path = RESULTS / RANKS
    if not path.exists():
        return NOTHING
    record = json.loads(path.read_text(encoding="utf-8"))
    runs = sorted((run for run in record["runs"] if run["rows"]), key=lambda run: run["gpus"])
    if not runs:
        return NOTHING
    caches = list(dict.fromkeys(row["cache"] for run in runs for row in run["rows"]))
    found = {(run["gpus"], row["cache"]): row for run in runs for row in run["rows"]}
    rows = []
    for cache in caches:
        cells = [found.get((run["gpus"], cache)) for run in runs]
        rows.append([cache, *("-" if cell is None else f"{cell['ms']:.2f}" for cell in cells)])
        rows[-1] += ["-" if cell is None else _captured(cell) for cell in cells]
    headers = ["cache", *(f"ms a token, {_gpus(run['gpus'])}" for run in runs)]
    headers += [f"decodes captured, {_gpus(run['gpus'])}" for run in runs]
    context, about = record["settings"]["context"], runs[0]
    return [
        f"`{record['model']}`, random weights, a prompt of {context:,} tokens, batch 1; {about['device']}, torch "
        f"{about['torch']}; {record['environment']['date_utc'][:10]}.",
        "",
        *_table(headers, rows),
    ]


def large_models() -> list[str]:
    """Return what weights and KV cache take of each GPU, and the bytes that a decode step reads there."""
    headers = ["model", "GPUs (tensor x pipeline)", "weights, GB", f"KV of {CONTEXT:,} tokens, GB: bf16", "int4"]
    headers += ["requests that fit: bf16", "int4", f"read in a step of {REQUESTS}, GB: bf16", "int4"]
    headers += [f"C={ratio}" for ratio in RATIOS]
    return [
        "Computed from the published sizes, not measured. For each GPU, with weights in bf16 and requests of "
        f"{CONTEXT:,} tokens; {SHARE_OF_MEMORY:.0%} of its memory is for weights and KV cache.",
        "",
        *_table(headers, [_model_row(each) for each in MACHINES]),
    ]


def _model_row(machines: Machines) -> list[str]:
    model, gpus = SHAPES[machines.shape], machines.tensor * machines.pipeline
    # Beyond a GPU for each KV head, vLLM stores heads on several GPUs.
    whole = AttentionShape(1, model.query_heads, model.kv_heads, model.head_dim)
    of_rank = replace(
        whole, query_heads=model.query_heads // machines.tensor, kv_heads=max(1, model.kv_heads // machines.tensor)
    )
    layers = model.layers / machines.pipeline
    weights, lengths = model.weights_bytes("bf16") / gpus, (CONTEXT,)
    dense, int4 = (layers * size for size in (dense_bytes(lengths, of_rank), stored_bytes(SERVED, lengths, of_rank)))
    budgets = [SERVED, *(with_pages(SERVED, ratio, CONTEXT, whole, "bf16", "") for ratio in RATIOS)]
    read = [dense, *(layers * interval_bytes(recipe, lengths, of_rank).kv for recipe in budgets)]
    room = SHARE_OF_MEMORY * machines.memory * 1e9 - weights
    return [
        model.published,
        f"{gpus} of {machines.memory} GB ({machines.tensor} x {machines.pipeline})",
        _gb(weights),
        _gb(dense),
        _gb(int4),
        *(f"{int(room / each)}" for each in (dense, int4)),
        *(_gb(weights + REQUESTS * each) for each in read),
    ]


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f}"


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' if count > 1 else ''}"


def _captured(row: dict[str, float | None]) -> str:
    share = row.get("captured_share")
    return "-" if share is None else f"{share:.0%}"


def _table(headers: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(headers)} |", "|" + "---|" * len(headers), *(f"| {' | '.join(row)} |" for row in rows)]
