"""`rounding=gptq` in a model's cache: the calibration's Hessians reach what is stored, and recipes without them are refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from elastickv.errors import UsageError
from elastickv.kvcache.gptq import hessian_of, hessian_text
from elastickv.recipe import AttentionShape, ModelCalibration, Recipe
from elastickv.recipe.calibration import StorageStatistics
from elastickv.transformers import ElasticCache
from elastickv.transformers.config import config_for
from elastickv.transformers.layer_storage import Backends, new_store
from elastickv.transformers.model_loading import fingerprint
from elastickv.transformers.model_support import Sizes
from tests.helpers.model_matrix import model

CPU, KV_HEADS, DIM, TOKENS = torch.device("cpu"), 2, 64, 300
SHAPE = AttentionShape(1, 6, KV_HEADS, DIM)
SMOOTHING = tuple(tuple((channel * (head + 3)) % 5 - 2 for channel in range(DIM)) for head in range(KV_HEADS))
GPTQ = "int4,rotate=kv,rounding=gptq"


@pytest.fixture(scope="module")
def tensors():
    """Keys and values, and the matrices whose rows meet their errors: queries, and columns of an output projection."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    rows = [normal(KV_HEADS, 2048, DIM) @ normal(KV_HEADS, DIM, DIM) for _ in range(2)]
    return normal(1, KV_HEADS, TOKENS, DIM), normal(1, KV_HEADS, TOKENS, DIM), [each.mT @ each / 2048 for each in rows]


def texts(matrices):
    return tuple(hessian_text(each.double().numpy()) for each in matrices)


def costs(recipe, statistics, tensors):
    """Return what the errors of stored keys and values cost."""
    keys, values, hessians = tensors
    store = new_store(Backends(), SHAPE, TOKENS, "fp32", Recipe.parse(recipe), DIM, CPU, statistics=statistics)
    store.extend(keys, values, np.array([TOKENS]))
    cold = slice(4, 164)
    errors = [(read - own)[0, :, cold] for read, own in zip(store.read(0, TOKENS), (keys, values), strict=True)]
    return [float(((e @ h) * e).sum(-1).mean()) for e, h in zip(errors, hessians, strict=True)]


@pytest.mark.parametrize("smoothing", [None, SMOOTHING])
def test_rotated_tensors_are_rounded_by_rotated_hessians(tensors, smoothing, monkeypatch):
    known = StorageStatistics(smoothing, *map(texts, tensors[2]))
    by_hessians, nearest = (costs(text, known, tensors) for text in (GPTQ, "int4,rotate=kv"))
    assert all(ours < 0.7 * plain for ours, plain in zip(by_hessians, nearest, strict=True))
    # Hessians that are not turned with the tensors make errors good where it does not help.
    monkeypatch.setattr("elastickv.kvcache.gptq.transformed", lambda hessians, *_: hessians)
    unturned = costs(GPTQ, known, tensors)
    assert all(wrong > plain for wrong, plain in zip(unturned, nearest, strict=True))


def test_keys_that_are_not_rotated_are_rounded_by_their_own_hessians_with_no_smoothing(tensors):
    hessians = [texts(each) for each in tensors[2]]
    smoothed, plain = (costs("int4,rounding=gptq", StorageStatistics(known, *hessians), tensors) for known in (SMOOTHING, None))
    assert smoothed == plain
    assert all(a < 0.7 * b for a, b in zip(plain, costs("int4", StorageStatistics(), tensors), strict=True))


def test_a_copy_of_a_store_rounds_as_it_does(tensors):
    keys, values, hessians = tensors
    known = StorageStatistics(SMOOTHING, *map(texts, hessians))
    store = new_store(Backends(), SHAPE, TOKENS, "fp32", Recipe.parse(GPTQ), DIM, CPU, statistics=known)
    store.extend(keys[:, :, :200], values[:, :, :200], np.array([200]))
    copy = store.copy(Backends())
    for each in (store, copy):
        each.extend(keys[:, :, 200:], values[:, :, 200:], np.array([TOKENS - 200]))
    for a, b in zip(copy.read(0, TOKENS), store.read(0, TOKENS), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def calibration(tensors):
    errors = ((0.5, 0.25),)
    hessians = {name: (texts(each),) for name, each in zip(("keys", "values"), tensors[2], strict=True)}
    return ModelCalibration(
        "model", "0" * 16, (4,), 6, KV_HEADS, DIM, "text", 512, 16, {1: {1.0: errors, 0.5: errors}}, {"int4": errors},
        {"int8": errors}, smoothing=(SMOOTHING,), hessians=hessians,
    )  # fmt: skip


def test_a_calibration_file_keeps_hessians_and_an_older_one_has_none(calibration):
    assert ModelCalibration.loads(calibration.dumps()) == calibration
    known = calibration.statistics_of(4)
    assert hessian_of(known.key_hessians[1], DIM).shape == (DIM, DIM)
    assert calibration.statistics_of(3) == StorageStatistics()
    older = replace(calibration, hessians=None)
    assert "hessians" not in json.loads(older.dumps())
    assert ModelCalibration.loads(older.dumps()).statistics_of(4) == StorageStatistics(SMOOTHING)


@pytest.mark.parametrize(
    ("damaged", "named"),
    [
        ({"keys": [["AAAA", "AAAA"]]}, "a Hessian of 3 bytes for heads of 64 channels"),
        ({"keys": [["A"]]}, "Hessians of 1 layers of 2 KV heads are needed"),
        ({"keys": [["AA*A", "AAAA"]]}, "damaged"),
        ({"keys": [[5, 6]]}, "damaged"),
        ({"values": None}, "damaged"),
        ({"keys": [[hessian_text(np.eye(DIM)).replace("AACAPwAA", "AADAfwAA", 1)] * 2]}, "negative or not finite"),
    ],
)
def test_damaged_hessians_are_refused(calibration, damaged, named):
    record = json.loads(calibration.dumps())
    record["hessians"] |= damaged
    with pytest.raises(UsageError, match=named):
        ModelCalibration.loads(json.dumps(record))


def test_a_model_without_hessians_refuses_the_recipe_before_its_first_token(calibration):
    sizes = Sizes("llama", elastic=(4,), query_heads=6, kv_heads=KV_HEADS, head_dim=DIM, max_positions=None)

    def config(**chosen):
        arguments = dict.fromkeys(("compress", "recipe", "layers", "calibration", "context", "capacity"))
        return config_for(sizes, **arguments | {"prefill": "stored"} | chosen)

    refusal = "needs a calibration with Hessians: run `elastickv calibrate` and give its file, or leave out rounding=gptq"
    for older in (None, replace(calibration, hessians=None)):
        with pytest.raises(UsageError, match=refusal):
            config(recipe=GPTQ, calibration=older)
        with pytest.raises(UsageError, match=refusal):
            config(recipe={4: GPTQ}, calibration=older)
    assert config(recipe=GPTQ, calibration=calibration).statistics_of(4) == calibration.statistics_of(4)


def test_a_model_generates_with_it_and_a_saved_cache_goes_on_as_before(calibration, tmp_path):
    tiny = model("llama")
    (keys,), (values,) = (calibration.hessians[name] for name in ("keys", "values"))
    errors = ((0.5, 0.25),) * 2
    known = replace(
        calibration, fingerprint=fingerprint(tiny), layers=(0, 1), query_heads=4, smoothing=(SMOOTHING,) * 2,
        pages={1: {1.0: errors, 0.5: errors}}, keys={"int4": errors}, values={"int8": errors},
        hessians={"keys": (keys, keys), "values": (values, values)},
    )  # fmt: skip
    prompt = torch.randint(3, 60, (1, 130), generator=torch.Generator().manual_seed(0))
    options = {"do_sample": False, "pad_token_id": 0}

    def generated(cache, text, tokens):
        return tiny.generate(
            text, attention_mask=torch.ones_like(text), past_key_values=cache, max_new_tokens=tokens, **options
        )

    made = ElasticCache.for_model(tiny, recipe=f"{GPTQ},window=16", calibration=known)
    nearest = ElasticCache.for_model(tiny, recipe="int4,rotate=kv,window=16", calibration=known)
    text = generated(made, prompt, 40)
    generated(nearest, text, 1)
    stored = [cache.layers[1].dequantized()[0][:, :, :128] for cache in (made, nearest)]
    assert not torch.equal(*stored)
    made.save(tmp_path / "cache.safetensors")
    saved = ElasticCache.load(tmp_path / "cache.safetensors", tiny)
    assert [str(recipe) for recipe in saved.recipes.values()] == [f"{GPTQ},window=16"] * 2
    assert torch.equal(*(generated(cache, text, 40) for cache in (saved, made)))
    for ours, others in zip(saved.layers[0].dequantized(), made.layers[0].dequantized(), strict=True):
        assert torch.equal(ours, others)
