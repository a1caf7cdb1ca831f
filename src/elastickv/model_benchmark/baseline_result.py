"""The JSON Schema of the baselines' results, `baseline.schema.json`.

`python -m elastickv.model_benchmark.baseline_result` rewrites that file.
"""

import json
from pathlib import Path
from typing import Any

from elastickv.benchmark.schema import schema_of
from elastickv.results.kinds.gguf_result import GgufBaseline
from elastickv.results.kinds.model_result import TransformersBaseline

SCHEMA_PATH = Path(__file__).with_name("baseline.schema.json")


def baseline_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of what `elastickv baseline` writes."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "ElasticKV baseline",
        "anyOf": [schema_of(TransformersBaseline), schema_of(GgufBaseline)],
    }


if __name__ == "__main__":
    SCHEMA_PATH.write_text(json.dumps(baseline_schema(), indent=2) + "\n", encoding="utf-8")
