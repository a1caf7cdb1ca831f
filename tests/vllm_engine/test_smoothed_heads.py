"""The heads of a step as a rotation with smoothing gives them to the kernels, and whose smoothing a rank has."""

from types import SimpleNamespace

import pytest
import torch

from elastickv.recipe import Recipe
from elastickv.vllm import model_setup
from elastickv.vllm.block_attention import HeadRotation
from elastickv.vllm.model_setup import ModelSetup

SMOOTHING = tuple(tuple((channel + head) % 7 - 3 for channel in range(64)) for head in range(4))
KEYS, BOTH = Recipe.parse("int4,rotate=k"), Recipe.parse("int4,rotate=kv")


def test_scores_and_outputs_are_those_of_the_models_own_heads():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(5, heads, 64, generator=generator, dtype=torch.float64) for heads in (12, 4, 4))
    rotation = HeadRotation(BOTH, 64, torch.float64, "cpu", SMOOTHING)
    rotated = rotation.rotate(query, key, value)
    scores = [torch.einsum("tghd,tgd->tgh", q.unflatten(1, (4, 3)), k) for q, k in ((query, key), rotated[:2])]
    assert torch.allclose(*scores, atol=1e-5)
    assert not torch.allclose(rotated[1], HeadRotation(BOTH, 64, torch.float64, "cpu").rotate(query, key, value)[1])
    output = rotated[2].clone()
    rotation.rotate_back(output)
    assert torch.allclose(output, value, atol=1e-5)


@pytest.mark.parametrize(("rank", "ranks", "heads", "first"), [(0, 1, 4, 0), (1, 2, 2, 2), (3, 4, 1, 3), (5, 8, 1, 2)], ids=str)
def test_a_rank_has_the_smoothing_of_its_heads(rank, ranks, heads, first, monkeypatch):
    """With eight ranks vLLM gives each of four KV heads to two."""
    monkeypatch.setattr(model_setup, "get_tensor_model_parallel_rank", lambda: rank)
    setup = ModelSetup.__new__(ModelSetup)
    setup._drafter, setup._smoothing = [], {3: SMOOTHING}
    setup.config = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: 4),
    )
    name = "model.layers.3.self_attn.attn"
    assert setup.smoothing_of_layer(name, KEYS) == SMOOTHING  # of all heads: names are the same on all ranks
    assert setup.of_this_rank(SMOOTHING, heads) == SMOOTHING[first : first + heads]
    assert setup.smoothing_of_layer("model.layers.2.self_attn.attn", KEYS) is None
    assert setup.smoothing_of_layer(name, Recipe.parse("int4,rotate=v")) is None
    assert setup.of_this_rank(None, heads) is None
