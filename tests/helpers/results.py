"""Results in the schema with times of one's own: a committed one, its samples replaced."""

import copy
import json
from pathlib import Path

import numpy as np

from elastickv.benchmark.stats.intervals import truncated

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results"
_TEMPLATE = json.loads((COMMITTED / "cpu" / "short.json").read_text(encoding="utf-8"))

# What the original program prints, key by key; the figures are made up.
ORIGINAL = {
    "benchmark_type": "elastic_kv_golden_ticket_en",
    "brand": "-",
    "build": {"cuda_graphs": True, "inner_loops": 64, "truncate_percent": 5},
    "gpu": {"name": "NVIDIA GeForce GTX 1070", "sm": "6.1", "theoretical_bw_gbs": 256.0},
    "configuration": {"seq_len": 1024, "heads": 16, "head_dim": 64, "compression": 2, "reps": 200, "warmup": 20},
    "results": {
        "attention_time_ms": 0.06, "attention_time_std": 0.0006, "coefficient_of_variation": 0.01, "tokens_per_sec": 16666.667,
        "baseline_tokens_per_sec": 10000.0, "speedup_vs_baseline": 1.667, "memory_bandwidth_gbs": 188.66,
        "memory_efficiency_percent": 73.7, "roofline_score": 1.0,
    },
    "inference_cycle": None,
}  # fmt: skip

INTERVAL = {"estimate": 1.0, "low": 0.9, "high": 1.1, "level": 0.95, "samples": 3, "block_length": 1}

# What `elastickv baseline gguf` writes; the figures are made up.
GGUF = {
    "kind": "elastickv-gguf-baseline",
    "version": 1,
    "environment": {"versions": {"elastickv": "0.1.0", "numpy": "2.5.2"}},
    "command": ["elastickv", "baseline", "gguf"],
    "engine": {"name": "xllamacpp", "version": "1", "device": "AMD EPYC", "backend": "CPU"},
    "threads": 2,
    "model": {
        "name": "tiny.gguf", "architecture": "llama", "file_bytes": 1 << 20, "layers": 2, "query_heads": 4, "kv_heads": [2, 2],
        "key_dim": 64, "value_dim": 64, "positions": 2048, "vocabulary": 256,
    },
    "context": 256,
    "tokens": 4,
    "rounds": 3,
    "seed": 0,
    "pairing": "abba",
    "caches": [
        {
            "cache": name,
            "prompt_tokens_per_s": 1280.0,
            "prompt_ms": INTERVAL,
            "tokens_per_s": 90.0,
            "step_ms": INTERVAL,
            "kv_bytes_per_token": 1024.0,
            "stored_ratio": 1.0,
            "fidelity": {
                "reference": "f16", "text": "morris.txt", "context": 256, "tokens": 8, "perplexity": 20.1,
                "reference_perplexity": 20.0, "kl_mean": kl, "kl_p95": 2 * kl, "kl_max": 3 * kl, "top1_percent": 100.0,
            },
            "prompt_s": [0.2, 0.21, 0.19],
            "decode_s": [0.04, 0.05, 0.045],
        }
        for name, kl in (("f16", 0.0), ("q8_0", 0.001))
    ],
    "speedups": {"q8_0": INTERVAL},
    "baseline": "f16",
    "noise_floor": None,
    "formats": [
        {
            "recipe": "int4", "recipe_hash": "0", "kv_bytes_per_token": 4096.0, "kv_bytes_per_cold_token": 4000.0,
            "stored_ratio": 3.25, "read_ratio": 3.5,
        }
    ],
    "formats_not_counted": None,
    "bytes_not_counted": None,
    "fidelity_not_measured": None,
    "seconds": 1.0,
}  # fmt: skip


def result(elastic=None, dense=None, *, seq=1024, recipe_error=None, cycle=False, **gpu):
    """Return a result with these samples, milliseconds per step; others are the committed one's."""
    made = copy.deepcopy(_TEMPLATE)
    made["configuration"]["seq_len"] = seq
    made["gpu"] |= gpu
    if not cycle:
        made["inference_cycle"] = None
    if elastic is not None:
        made["samples"] = {
            name: np.asarray(s).tolist() for name, s in (("baseline", dense), ("elastic", elastic), ("baseline-again", dense))
        }
        made["results"]["attention_time_ms"] = float(truncated(elastic, 5).mean())
    if recipe_error is not None:
        made["fidelity"]["sample"]["recipe_error"] |= {"mean": recipe_error, "p95": 3 * recipe_error}
    return made


def quiet(milliseconds, seed=0, rounds=60):
    """Return samples of a machine that hardly disturbs."""
    return milliseconds * np.exp(np.random.default_rng(seed).standard_normal(rounds) * 0.003)


def write(folder, name, value):
    """Write JSON, or JSON Lines of a list, and return its path."""
    path = folder / name
    text = "".join(json.dumps(v) + "\n" for v in value) if path.suffix == ".jsonl" else json.dumps(value)
    path.write_text(text, encoding="utf-8")
    return path
