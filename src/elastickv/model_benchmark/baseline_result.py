"""The results of the baselines, described by `baseline.schema.json`.

`python -m elastickv.model_benchmark.baseline_result` rewrites that file.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastickv.benchmark.schema import schema_of
from elastickv.benchmark.stats.intervals import Interval
from elastickv.model_benchmark.quality_delta import QualityDelta

SCHEMA_PATH = Path(__file__).with_name("baseline.schema.json")
GGUF_KIND = "elastickv-gguf-baseline"
GGUF_VERSION = 1


@dataclass(frozen=True)
class GgufShape:
    """The model of a .gguf file; `file_bytes` are its weights and a little more."""

    name: str
    architecture: str
    file_bytes: int
    layers: int
    query_heads: int
    kv_heads: list[int]
    key_dim: int
    value_dim: int
    positions: int
    vocabulary: int


@dataclass(frozen=True)
class KvCache:
    """One KV cache type of llama.cpp.

    Speeds are those of the mean sample; `prompt_ms` and `step_ms` are means of a token with their intervals, and
    `prompt_s` and `decode_s` the samples: seconds of the whole prompt, and of all decodes after it. Bytes are of one token
    in all layers; null where `bytes_not_counted` says why.
    """

    cache: str
    prompt_tokens_per_s: float
    prompt_ms: Interval
    tokens_per_s: float
    step_ms: Interval
    kv_bytes_per_token: float | None
    stored_ratio: float | None
    fidelity: QualityDelta | None
    prompt_s: list[float]
    decode_s: list[float]


@dataclass(frozen=True)
class OurFormat:
    """One of our formats for the same layers: bytes of one token in all of them.

    `kv_bytes_per_token` and the ratios are of the whole cache at the context, sinks and window counted;
    `kv_bytes_per_cold_token` is what each token adds that has left the window.
    """

    recipe: str
    recipe_hash: str
    kv_bytes_per_token: float
    kv_bytes_per_cold_token: float
    stored_ratio: float
    read_ratio: float


@dataclass(frozen=True)
class GgufBaseline:
    """llama.cpp's speed and predictions with each of its KV cache types, taking turns, and our formats' bytes beside theirs."""

    kind: str
    version: int
    environment: dict[str, Any]
    command: list[str]
    engine: dict[str, str]
    threads: int
    model: GgufShape
    context: int
    tokens: int
    rounds: int
    seed: int
    pairing: str
    caches: list[KvCache]
    speedups: dict[str, Interval | None]
    baseline: str
    noise_floor: Interval | None
    formats: list[OurFormat]
    formats_not_counted: str | None
    bytes_not_counted: str | None
    fidelity_not_measured: str | None
    seconds: float


@dataclass(frozen=True)
class TransformersBaseline:
    """A result of `elastickv bench --model` with the price of its recipe; `caches` are receipts, as in docs/run.md."""

    kind: str
    version: int
    environment: dict[str, Any]
    machine: dict[str, Any]
    command: list[str]
    model: dict[str, Any]
    compress: float | None
    recipe: str | None
    calibrated: bool
    context: int
    batch: int
    rounds: int
    tokens: int
    seed: int
    temperature: float
    pairing: str
    caches: list[dict[str, Any]]
    speedups: dict[str, Interval | None]
    baseline: str | None
    noise_floor_of: str
    noise_floor: Interval | None
    faster: bool | None
    not_run: dict[str, str]
    host: dict[str, Any] | None
    fidelity: QualityDelta | None
    fidelity_not_measured: str | None


def baseline_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of what `elastickv baseline` writes."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "ElasticKV baseline",
        "anyOf": [schema_of(TransformersBaseline), schema_of(GgufBaseline)],
    }


if __name__ == "__main__":
    SCHEMA_PATH.write_text(json.dumps(baseline_schema(), indent=2) + "\n", encoding="utf-8")
