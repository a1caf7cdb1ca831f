"""`elastickv eval --engine vllm` on a GPU, in bfloat16 with graphs.

`python -m pytest tests/vllm_engine/gpu/test_gpu_evaluation.py -m gpu`; engines are processes of their own.
"""

import pytest

from elastickv.benchmark.reporter import SILENT
from elastickv.evaluation.serving.engine_options import EngineOptions
from elastickv.evaluation.serving.evaluate_served import evaluate_served
from elastickv.evaluation.serving.served_checkpoint import ServedCheckpoint
from tests.helpers.served_evaluation import OPTIONS, WINDOW, difference, losses_in_transformers, random_texts
from tests.helpers.served_llama import write_model
from tests.helpers.serving_scenarios import GPU_MEMORY

pytestmark = pytest.mark.gpu

# Of a KL, in parts of it: this model's predictions are sharp, and bfloat16 alone moves them.
ROUNDING = 0.15


def test_losses_are_those_of_transformers_up_to_rounding(weights, device, tmp_path):
    folder, texts = write_model(tmp_path / "llama", weights, tokenizer=True), random_texts()
    arguments = {} if device == "cpu" else GPU_MEMORY
    served = ServedCheckpoint(str(folder), "bf16", device, EngineOptions(arguments, {"window": WINDOW}), None)
    result = evaluate_served(served, texts, OPTIONS, None, SILENT)
    rows = {row["cache"]: row for row in result["rows"]}
    assert list(rows) == ["C=3", "int4"] and "pages=" in rows["C=3"]["recipes"][0]
    with losses_in_transformers(folder, texts) as losses:
        for cache, row in rows.items():
            expected = losses(row).kl.mean
            print(f"measured: {cache}: KL {row['kl']['mean']:.4f} in the engine, {expected:.4f} in Transformers")
            assert difference(row["kl"]["mean"], expected) < ROUNDING
    reference, ours = (result["engine"][name]["backends"] for name in ("reference", "served"))
    assert not any("elastickv" in name for name in reference) and any("elastickv" in name for name in ours)
