"""Models that are split over ranks by `tp_plan`: two processes on the CPU, or two GPUs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import elastickv.transformers as ekv
from elastickv.errors import NonFiniteError, UsageError
from elastickv.recipe import Recipe
from elastickv.recipe.calibration import ModelCalibration, StorageStatistics
from elastickv.transformers.cuda_graph import captured
from elastickv.transformers.cuda_graph import recorder as recorders
from elastickv.transformers.layer_storage import LayerStorage
from elastickv.transformers.model_loading import fingerprint
from elastickv.transformers.placement import Ranks
from tests.helpers.captured_decode import FakeRecorder
from tests.helpers.model_matrix import model, padded, prompt
from tests.helpers.ranks import run_on_ranks, split

SPLIT = ("llama", "qwen3", "olmo2")  # the heads of the last lie whole on every rank
EVEN = {"vocab_size": 212}  # Transformers 5.17 deals out whole rows
RATIO = 4.5  # with which what is left of the budget goes to heads of the second rank

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch is built without torch.distributed"),
    pytest.mark.filterwarnings("ignore::elastickv.transformers.config.UncalibratedWarning"),
]


def errors_of(made: Any) -> ModelCalibration:
    """Return errors of four KV heads: equal for the first two, which are on one rank, and different for the others."""
    curve = {1.0: ((0.0,) * 4,) * 2, 0.5: ((1e-3, 1e-3, 4e-3, 2e-4),) * 2, 0.125: ((1e-2, 1e-2, 8e-2, 1e-3),) * 2}
    none, little = ((0.0,) * 4,) * 2, ((1e-5,) * 4,) * 2
    formats = {"keys": {"int8": none, "int4": little}, "values": {"int8": none, "int4/32": little}}
    return ModelCalibration("tiny", fingerprint(made), (0, 1), 8, 4, 64, "a text", 100, 10, {1: curve}, **formats)


def tokens(made: Any, inputs: dict[str, torch.Tensor], count: int = 16, **options: Any) -> list[list[int]]:
    on_device = {name: tensor.to(made.device) for name, tensor in inputs.items()}
    return made.generate(**on_device, max_new_tokens=count, do_sample=False, **options)[:, -count:].tolist()


def with_elastic(made: Any, compress: float, inputs: dict[str, torch.Tensor], **options: Any) -> tuple[list[list[int]], Any]:
    cache = ekv.ElasticCache.for_model(made, compress, **options)
    return tokens(made, inputs, past_key_values=cache), cache


def outcome(made: Any) -> dict[str, list[list[int]]]:
    inputs = padded([500, 443])
    return {
        "stock": tokens(made, inputs),
        "1": with_elastic(made, 1, inputs)[0],
        "4": with_elastic(made, 4, inputs)[0],
    }


def calibrated(made: Any) -> tuple[list[list[int]], Any]:
    return with_elastic(made, RATIO, prompt(1, 1600), calibration=errors_of(made))


def refusal(act: Any) -> str:
    try:
        act()
    except UsageError as error:
        return str(error)
    return "nothing is refused"


class LateRecorder(FakeRecorder):
    """A recorder that fails after the pass: its passes communicate with other ranks, whether recorded or not."""

    late: Exception | None = None

    def record(self, run: Any) -> Any:
        replay = super().record(run)
        if self.late:
            raise self.late
        return replay


def launch_key_by_shares(store: LayerStorage) -> tuple[int, bool]:
    """Return a key as the CUDA backend's: heads that read alike run another kernel."""
    return id(store.cache), len(set(store.shares)) > 1


def note_shares(store: LayerStorage, fractions: list[float]) -> None:
    store.shares = tuple(fractions)
    store.cache.set_fractions(fractions)


def captured_counts(made: Any) -> dict[str, Any]:
    """Generate across the context from which the ratio holds, and the shares differ; some ranks can't capture later on."""
    stand_in = LateRecorder()
    with pytest.MonkeyPatch.context() as patch:
        for module in (captured, recorders):
            patch.setattr(module, "recorder_for", lambda device: stand_in)
        patch.setattr(LayerStorage, "launch_key", property(launch_key_by_shares))
        patch.setattr(LayerStorage, "set_fractions", note_shares)
        cache = ekv.ElasticCache.for_model(made, RATIO, calibration=errors_of(made))
        start = cache.report().holds_from - 6
        captured_tokens = tokens(made, prompt(1, start), past_key_values=cache)
        counts = [stand_in.rehearsed, stand_in.recorded, cache.report().captured]
        rank = torch.distributed.get_rank()
        uneven = [len(set(layer.store.shares)) > 1 for layer in cache.elastic_layers]
        reasons = []
        for fails, waits in ((RuntimeError("no memory"), None), (None, "file.py:3")):
            stand_in.late, stand_in.waits = (fails, waits) if rank else (None, None)
            other = ekv.ElasticCache.for_model(made, RATIO, calibration=errors_of(made))
            again = tokens(made, prompt(1, start), past_key_values=other)
            reasons.append([again == captured_tokens, other.report().captured, other.report().not_captured])
        ekv.release(made)
    plain = tokens(made, prompt(1, start), past_key_values=ekv.ElasticCache.for_model(made, RATIO, calibration=errors_of(made)))
    return {"counts": counts, "uneven": uneven, "reasons": reasons, "same": captured_tokens == plain}


def on_cpu(folder: Path) -> dict[str, Any]:
    """Return the results of a rank on the CPU."""
    results: dict[str, Any] = {name: outcome(split(folder / name)) for name in SPLIT}
    cut = split(folder / "llama-mqa")
    results["cut"] = refusal(lambda: ekv.ElasticCache.for_model(cut, 4))
    made = split(folder / "four")
    results["calibrated"], cache = calibrated(made)
    report = cache.report()
    results |= {
        "heads": [layer.store.cache.shape.kv_heads for layer in cache.elastic_layers],
        "fractions": [layer.store.cache.recipe.fractions for layer in cache.elastic_layers],
        "whole": [recipe.fractions for recipe in cache._config.budget.recipes.values()],
        "ranks": report.ranks,
        "bytes": [report.stored_bytes, report.dense_bytes, report.read_bytes, report.dense_read_bytes],
        "allocated": report.allocated_bytes,
        "printed": str(report),
        "saved": refusal(lambda: cache.save(folder / "cache")),
        "loaded": refusal(lambda: ekv.ElasticCache.load(folder / "of_one_process", made)),
        "captures": captured_counts(made),
    }
    return results


def on_gpus(folder: Path) -> dict[str, Any]:
    """Return the results of a rank on its GPU; the second generation crosses the context from which shares differ."""
    made = split(folder)
    inputs = padded([500, 443])
    results: dict[str, Any] = {"stock": tokens(made, inputs), "1": with_elastic(made, 1, inputs)[0]}
    for name, capture in (("plain", False), ("captured", True)):
        cache = ekv.ElasticCache.for_model(made, RATIO, calibration=errors_of(made), capture=capture)
        results[name] = tokens(made, prompt(2, cache.report().holds_from - 6), 24, past_key_values=cache)
    report = cache.report()
    return results | {"counts": [report.decodes, report.captured, report.not_captured]}


def save_four_heads(folder: Path) -> Any:
    made = model("llama", num_attention_heads=8, num_key_value_heads=4, **EVEN)
    made.save_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return the results of one process and of each of two."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("PyTorch is built without gloo")
    folder = tmp_path_factory.mktemp("ranks")
    alone = {name: model(name, **EVEN) for name in (*SPLIT, "llama-mqa")}
    for name, made in alone.items():
        made.save_pretrained(folder / name)
    alone["four"] = save_four_heads(folder / "four")
    results: dict[str, Any] = {name: outcome(alone[name]) for name in SPLIT}
    results["calibrated"], cache = calibrated(alone["four"])
    cache.save(folder / "of_one_process")
    return SimpleNamespace(alone=results, report=cache.report(), each=run_on_ranks(on_cpu, folder, 2, "gloo"))


@pytest.mark.parametrize("name", SPLIT)
def test_tokens_are_those_of_one_process(ranks, name):
    for rank in ranks.each:
        assert rank[name]["1"] == rank[name]["stock"]
        assert rank[name] == ranks.alone[name]
    assert ranks.alone[name]["4"] != ranks.alone[name]["stock"]


def test_every_rank_reads_the_calibrated_shares_of_its_own_heads(ranks):
    first, second = ranks.each
    assert first["heads"] == second["heads"] == [2, 2]
    for mine, others, whole in zip(first["fractions"], second["fractions"], first["whole"], strict=True):
        assert mine + others == whole
        assert len(set(mine)) == 1 < len(set(others))
    assert first["calibrated"] == second["calibrated"] == ranks.alone["calibrated"]


def test_a_report_is_of_the_whole_model_and_what_is_allocated_of_the_rank(ranks):
    report = ranks.report
    for rank in ranks.each:
        assert rank["ranks"] == 2
        assert rank["bytes"] == [report.stored_bytes, report.dense_bytes, report.read_bytes, report.dense_read_bytes]
        assert 0.4 * report.allocated_bytes < rank["allocated"] < 0.6 * report.allocated_bytes
        assert "allocated on this rank, one of 2" in rank["printed"]
    assert report.ranks == 1
    assert "on this rank" not in str(report)


def test_what_cannot_be_right_is_refused(ranks):
    for rank in ranks.each:
        assert "split over 2 ranks and has 1 KV heads" in rank["cut"]
        assert "split over 2 ranks" in rank["saved"]
        assert "split over 2 ranks" in rank["loaded"]


def test_all_ranks_capture_or_none(ranks):
    first, second = (rank["captures"] for rank in ranks.each)
    assert [first["uneven"], second["uneven"]] == [[False, False], [True, True]]
    assert first["counts"] == second["counts"]
    assert first["counts"][1] == 2
    assert first["same"]
    assert second["same"]
    elsewhere = "another rank of the model cannot capture them"
    assert first["reasons"] == [[True, 0, elsewhere], [True, 0, elsewhere]]
    assert second["reasons"] == [
        [True, 0, "the capture failed: RuntimeError: no memory"],
        [True, 0, "it waits for the device (file.py:3)"],
    ]


def test_a_rank_takes_the_shares_of_its_own_heads():
    recipe = Recipe.parse("int4,pages=1/2:1/4:1/8:1/16")
    assert Ranks(1, 2).share(recipe, 4, 2).fractions == (1 / 8, 1 / 16)
    assert Ranks(1, 2).share(recipe, 4, 4) == recipe
    assert Ranks(1, 2).share(Recipe.parse("int4,pages=1/2"), 4, 2).fractions == (1 / 2,)


def test_a_value_that_is_not_finite_is_reported_with_its_rank():
    broken = model("llama")
    with torch.no_grad():
        broken.model.layers[1].self_attn.k_proj.weight[70] = torch.nan
    cache = ekv.ElasticCache.for_model(broken, 4)
    cache._checks.ranks = Ranks(1, 2)
    with pytest.raises(NonFiniteError, match=r"layer 1 of rank 1 of 2: .*KV head 1, position 0"):
        broken.generate(**prompt(1, 40), max_new_tokens=1, past_key_values=cache)


@pytest.mark.gpu
@pytest.mark.usefixtures("two_gpus")
def test_two_gpus_capture_alike(tmp_path):
    if not torch.distributed.is_nccl_available():
        pytest.skip("NCCL is needed")
    save_four_heads(tmp_path)
    first, second = run_on_ranks(on_gpus, tmp_path, 2, "nccl")
    assert first == second
    assert first["1"] == first["stock"]
    assert first["captured"] == first["plain"]
    # One rehearsal while everything is read, and one when the second rank's heads come to read unlike shares.
    assert first["counts"] == [23, 21, None]


def test_ranks_share_what_is_of_each_head():
    of_model = StorageStatistics(((1,), (2,), (3,), (4,)), ("a", "b", "c", "d"), ("e", "f", "g", "h"))
    assert Ranks(0, 2).share_heads(of_model, 2) == StorageStatistics(((1,), (2,)), ("a", "b"), ("e", "f"))
    assert Ranks(1, 2).share_heads(of_model, 2) == StorageStatistics(((3,), (4,)), ("c", "d"), ("g", "h"))
    assert Ranks(1, 2).share_heads(StorageStatistics(), 2) == StorageStatistics()
