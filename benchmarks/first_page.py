"""What it costs that a serving engine reads the first page, which has no exact tokens there, as it is stored.

    python benchmarks/first_page.py --model MODEL [--output FILE] [--windows 4] [--tokens 2048] [--formats int4,k8v4,int8,fp8]
        [--exact-tokens 128,64]

Transformers reads windows of the shipped texts by the read rule of an engine (`read_rule.py`), in float32, and the predictions
of each window's second half are compared with those of full attention. Variants differ in the first page only: stored as all
pages are, in int8, with int8 keys alone, exact, and the first four tokens exact, before the pages begin, as in `ElasticCache`.
Intervals are bootstrap intervals over blocks of 64 consecutive tokens; differences are between the same tokens of two variants.
Writes `results/cpu/first_page-MODEL.json` after every window.

Needs: pip install "elastickv[transformers]".
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command_line import exit_with
from read_rule import ReadRule, reading
from suite import heading
from transformers.cache_utils import DynamicLayer

from elastickv.evaluation.metrics import RESAMPLES, Scores, fidelity, token_figures
from elastickv.evaluation.texts import Window, evaluation_texts, windows
from elastickv.recipe import Recipe
from elastickv.results.files import check_writable
from elastickv.results.formats import dumps, write_text
from elastickv.transformers.model_loading import Loaded, fingerprint, load_model
from elastickv.transformers.model_support import stock_layers, text_config
from elastickv.transformers.tokenization import tokens_hash
from elastickv.vllm.serving_options import PAGE_FORMATS

KIND, VERSION = "elastickv-first-page", 1
RESULTS = Path(__file__).parent / "results" / "cpu"
RECIPES = {name: Recipe.parse(text) for name, text in PAGE_FORMATS.items()}
EXACT_TOKENS = (128, 64)
SINKS = 4
BLOCK_TOKENS = 64
ROWS_AT_ONCE = 4
AS_STORED = "as all pages"
Cell = tuple[str, int, str]


def variants(name: str, window: int) -> dict[str, ReadRule]:
    """Return the rules of a format by what the first page is."""
    rule = ReadRule(RECIPES[name], window)
    rules = {AS_STORED: rule}
    if name != "int8":
        rules["int8"] = replace(rule, first_page=RECIPES["int8"])
    if name == "int4":
        rules["int8 keys"] = replace(rule, first_page=RECIPES["k8v4"])
    rules["exact"] = replace(rule, first_page=Recipe.parse("dense"))
    rules["first four tokens exact"] = replace(rule, sinks=SINKS)
    return rules


def cells(formats: list[str], exact: list[int]) -> Iterator[tuple[Cell, ReadRule]]:
    """Yield the format, R, the variant of the first page, and the rule; of formats but the first, the first R alone."""
    for name in formats:
        for window in exact if name == formats[0] else exact[:1]:
            for variant, rule in variants(name, window).items():
                yield (name, window, variant), rule


def figures(full: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    """Return the (4, tokens) figures of `token_figures`, some rows at a time: logits in float64 take much memory."""
    parts = zip(*(tensor.split(ROWS_AT_ONCE) for tensor in (full, logits, targets)), strict=True)
    return np.concatenate([np.stack(token_figures(*(part.numpy() for part in each))) for each in parts], axis=1)


def scored(loaded: Loaded, window: Window, rules: list[tuple[Cell, ReadRule]]) -> dict[Cell, np.ndarray]:
    """Return the figures of the second half of a window, (4, tokens), for every cell."""
    ids = torch.tensor(window.ids)
    inputs, count = ids[None, :-1], (len(ids) - 1) // 2
    rows = {}
    with torch.inference_mode():
        full = loaded.model(inputs, use_cache=False, logits_to_keep=count).logits[0]
        for cell, rule in rules:
            start = time.monotonic()
            with reading(loaded.model, rule):
                logits = loaded.model(inputs, use_cache=False, logits_to_keep=count).logits[0]
            rows[cell] = figures(full, logits, ids[-count:])
            print(f"{cell}: KL {rows[cell][2].mean():.3e}  ({time.monotonic() - start:.0f} s)", flush=True)
    return rows


def mean_difference(blocks: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Return the mean of the (blocks, tokens) differences with a 95 % percentile bootstrap interval over blocks."""
    means = blocks.mean(axis=1)
    picks = np.random.default_rng(seed).integers(len(means), size=(RESAMPLES, len(means)))
    low, high = np.quantile(means[picks].mean(axis=1), [0.025, 0.975])
    return {"mean": float(means.mean()), "low": float(low), "high": float(high)}


def summary(rows: list[dict[Cell, np.ndarray]]) -> list[dict[str, Any]]:
    """Return a record for every cell from the figures of all windows."""
    records = []
    in_blocks = {
        cell: np.stack([each[cell] for each in rows], axis=1).reshape(4, -1, min(BLOCK_TOKENS, rows[0][cell].shape[1]))
        for cell in rows[0]
    }
    for (name, window, variant), each in in_blocks.items():
        base = in_blocks[name, window, AS_STORED]
        record = {"format": name, "exact_tokens": window, "first_page": variant} | asdict(fidelity(Scores(*each)))
        record["kl_of_windows"] = [float(row[name, window, variant][2].mean()) for row in rows]
        if variant != AS_STORED:
            record["kl_saved"] = mean_difference(base[2] - each[2])
            record["nll_saved"] = mean_difference(base[1] - each[1])
        records.append(record)
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder, a .gguf file or a hub id")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/cpu/first_page-MODEL.json")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048, help="of a window; the second half is scored")
    parser.add_argument("--formats", default=",".join(RECIPES), help="of pages")
    parser.add_argument(
        "--exact-tokens", default=",".join(map(str, EXACT_TOKENS)), help="R; all but the first for the first format"
    )
    options = parser.parse_args()
    formats = options.formats.split(",")
    if not set(formats) <= set(RECIPES) or options.tokens % (2 * BLOCK_TOKENS):
        parser.error(f"--formats are {', '.join(RECIPES)}; --tokens is a multiple of {2 * BLOCK_TOKENS}")
    rules = list(cells(formats, [int(number) for number in options.exact_tokens.split(",")]))
    start = time.monotonic()
    loaded = load_model(options.model)
    if any(type(layer) is not DynamicLayer for layer in stock_layers(text_config(loaded.model))):
        parser.error(f"--model {options.model}: not every layer attends to the whole context; give another model")
    output = options.output or RESULTS / f"first_page-{Path(options.model).stem}.json"
    check_writable(output)
    cut = windows(evaluation_texts(), loaded.tokenizer, options.tokens + 1, options.windows)
    rows: list[dict[Cell, np.ndarray]] = []
    for window in cut:
        rows.append(scored(loaded, window, rules))
        record = heading(KIND, VERSION, start)
        record["environment"]["versions"]["transformers"] = version("transformers")
        # The command names files of this machine only.
        record["command"] = [
            "python",
            "benchmarks/first_page.py",
            "--windows",
            str(options.windows),
            "--tokens",
            str(options.tokens),
        ]
        record["command"] += ["--formats", options.formats, "--exact-tokens", options.exact_tokens]
        record |= {"model": loaded.name, "model_fingerprint": fingerprint(loaded.model), "dtype": "fp32"}
        done = cut[: len(rows)]
        record["windows"] = [{"text": each.text, "first": each.first, "tokens": options.tokens} for each in done]
        record["tokens_hash"] = tokens_hash([each.ids for each in done])
        record["scored_tokens_of_a_window"] = options.tokens // 2
        record["bootstrap"] = {"unit": f"{BLOCK_TOKENS} consecutive tokens", "resamples": RESAMPLES, "level": 0.95}
        write_text(output, dumps(record | {"cells": summary(rows)}))
    return 0


if __name__ == "__main__":
    exit_with(main)
