"""An adapter changes keys and values before they are stored."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.read_rule import follows
from tests.helpers.serving_scenarios import all_follow

RANK, ALPHA = 8, 16


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, weights):
    """Return the folder of an adapter of the query, key and value projections, and the weights with it merged."""
    generator, tensors, merged = torch.Generator().manual_seed(7), {}, dict(weights)
    for layer in range(2):
        for part in ("q_proj", "k_proj", "v_proj"):
            name = f"model.layers.{layer}.self_attn.{part}"
            rows, columns = weights[f"{name}.weight"].shape
            down = torch.randn(RANK, columns, generator=generator) / columns**0.5
            up = torch.randn(rows, RANK, generator=generator) * 0.3
            tensors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
            merged[f"{name}.weight"] = weights[f"{name}.weight"] + up @ down * (ALPHA / RANK)
    folder = tmp_path_factory.mktemp("adapter")
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder, merged


def test_requests_with_an_adapter_and_without_share_no_prefix(serve, rule, prompts, adapter):
    """One kind after the other: vLLM 0.32 on CPUs applies the adapter to all requests of a step."""
    folder, merged = adapter
    engine = serve(enable_lora=True, max_lora_rank=RANK, max_loras=1, enable_prefix_caching=True)
    own = engine.finish([engine.add(prompt, 40, lora=folder) for prompt in prompts], prompts)
    plain = engine.generate(prompts, 40)
    all_follow(rule(weights=merged), own)
    all_follow(rule(), plain)
    assert follows(rule(), own[2]) is not None
    assert all(answer.cached == 0 for answer in plain)
