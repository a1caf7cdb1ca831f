"""Recipe errors on a sample, in float64 NumPy: recipe on the reference cache vs dense attention on the sample's K, V.

    python benchmarks/recipe_errors.py [--input FILE] [--output FILE] [RECIPE ...]

The committed results are of `data/smollm2-135m.safetensors`; without --input the shipped sample is read.

The sample's first tokens are the prefill; the tokens that have queries are appended and decoded one by one, so that anchors
and ageing pages show. One error per layer x query head x query: relative L2 of the head's output. Prints a Markdown table.
These are recipes as they are; what went into them, and what did not, is `recipe_study.py`'s.
"""

import argparse
import datetime
import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
from command_line import exit_with
from numpy.typing import NDArray

from elastickv import Recipe, __version__
from elastickv.benchmark.sample_inputs import Sample, load_sample
from elastickv.kvcache import ReferenceCache
from elastickv.kvcache.attention import attend
from elastickv.kvcache.error_metrics import relative_l2, summarize
from elastickv.recipe import read_ratio, stored_ratio

DTYPE = "bf16"
RECIPES = (
    "int8",
    "fp8",
    "k=int8,v=int4,vgroup=32",
    "k=int8,v=int4",
    "k=int4,v=int8",
    "int4,vgroup=32",
    "int4",
    *(f"int4,pages={fraction}" for fraction in ("1/2", "1/4", "1/8", "1/16")),
    *(f"int4,pages={fraction},anchor_every={steps}" for fraction in ("1/2", "1/4", "1/8") for steps in (4, 16)),
    *(f"{cold}stride={stride}" for stride in (2, 3, 4, 5, 6, 8) for cold in ("bf16,", "int8,")),
    "reuse,anchor_every=4,decay=0.95,sinks=0,window=0",
    "reuse,anchor_every=4,decay=0.95",
)
DEFAULT_OUTPUT = Path(__file__).parent / "results" / "sample" / "recipe_errors.json"


def dense_outputs(sample: Sample) -> NDArray[np.float64]:
    """Return (layers, queries, query_heads, head_dim): each query over the keys up to its own position."""
    group, start = sample.shape.group, sample.tokens - sample.queries
    outputs = np.empty((sample.layers, sample.queries, sample.shape.query_heads, sample.shape.head_dim))
    for layer, step, head in np.ndindex(outputs.shape[:3]):
        stop = start + step + 1
        k, v = sample.k[layer, head // group, :stop], sample.v[layer, head // group, :stop]
        outputs[layer, step, head] = attend(sample.q[layer, head, step][None], k, v).output[0]
    return outputs


def recipe_outputs(sample: Sample, recipe: Recipe) -> NDArray[np.float64]:
    """Return what `dense_outputs` does, decoded from the reference cache of `recipe`."""
    start, steps = sample.tokens - sample.queries, []
    for layer in range(sample.layers):
        cache = ReferenceCache(sample.shape, sample.tokens, DTYPE, recipe)
        k, v, q = sample.k[layer][None], sample.v[layer][None], sample.q[layer][None]
        cache.prefill(k[:, :, :start], v[:, :, :start], np.array([start]))
        for step in range(sample.queries):
            cache.append(k[:, :, start + step], v[:, :, start + step])
            steps.append(cache.decode(q[:, :, step])[0][0])
    return np.array(steps).reshape(sample.layers, sample.queries, sample.shape.query_heads, sample.shape.head_dim)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=RECIPES, metavar="RECIPE")
    parser.add_argument("--input", type=Path, help="a sample as docs/bench.md describes it")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    options = parser.parse_args()
    sample = load_sample(options.input)
    dense = dense_outputs(sample)
    layers = sample.metadata["layers"].split(", ")
    rows = []
    print("| recipe | read ratio | stored ratio | mean | p95 | max | mean by layer " + " / ".join(layers) + " |")
    print("|---|---|---|---|---|---|---|")
    for text in options.recipes:
        recipe = Recipe.parse(text)
        errors = relative_l2(recipe_outputs(sample, recipe), dense)
        summary, by_layer = summarize(errors), [summarize(of_layer) for of_layer in errors]
        row = {
            "recipe": str(recipe),
            "hash": recipe.hash,
            "read_ratio": read_ratio(recipe, [sample.tokens], sample.shape, DTYPE),
            "stored_ratio": stored_ratio(recipe, [sample.tokens], sample.shape, DTYPE),
            "error": asdict(summary),
            "error_by_layer": dict(zip(layers, map(asdict, by_layer), strict=True)),
        }
        rows.append(row)
        means = " / ".join(f"{layer.mean:.4f}" for layer in by_layer)
        print(
            f"| `{recipe}` | {row['read_ratio']:.2f} | {row['stored_ratio']:.2f} | {summary.mean:.4f} | {summary.p95:.4f} "
            f"| {summary.max:.4f} | {means} |"
        )
    record = {
        "date_utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"elastickv": __version__, "numpy": version("numpy")},
        "sample": dict(sample.metadata),
        "model_dtype": DTYPE,
        "context": sample.tokens,
        "recipes": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.output.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    temporary.replace(options.output)


if __name__ == "__main__":
    exit_with(main)
