"""Unsupported models and calls raise a one-line error with the reason before work is lost."""

import weakref
from typing import Any

import pytest
import torch
import transformers as tf

import elastickv.transformers as ekv
from elastickv.errors import UsageError
from elastickv.recipe.calibration import ModelCalibration
from elastickv.transformers import layer_storage
from elastickv.transformers.model_loading import fingerprint
from elastickv.transformers.placement import layers_on_same_device
from tests.helpers.model_matrix import CONFIGS, model, padded, prompt


@pytest.fixture(scope="module")
def tiny():
    return model("llama")


@pytest.fixture(autouse=True)
def stock(tiny):
    tiny.set_attn_implementation("sdpa")


def cache_of(tiny, **options):
    return ekv.ElasticCache.for_model(tiny, **({"recipe": "int4"} | options))


def small(kind: str, **sizes: Any) -> Any:
    common = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return getattr(tf, f"{kind}Config")(**common | sizes)


MODELS = {
    "encoder-decoder": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=64, d_model=32, d_ff=32, num_layers=1, num_heads=2)
    ),
    "no KV cache": lambda: tf.MambaForCausalLM(tf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1)),
    "is an encoder": lambda: tf.BertModel(small("Bert")),
    "latent attention": lambda: tf.DeepseekV3ForCausalLM(
        small(
            "DeepseekV3",
            kv_lora_rank=16,
            q_lora_rank=16,
            n_routed_experts=2,
            num_experts_per_tok=1,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=2,
        )
    ),
    "at most 256": lambda: tf.LlamaForCausalLM(small("Llama", head_dim=320)),
    "no Transformers model": lambda: torch.nn.Linear(2, 2),
}


@pytest.mark.parametrize("reason", list(MODELS))
def test_models_that_cannot_be_served_are_refused_by_name(reason):
    made = MODELS[reason]()
    with pytest.raises(UsageError, match=reason) as caught:
        ekv.ElasticCache.for_model(made, compress=4)
    assert type(made).__name__ in str(caught.value) or "head" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_model_is_refused_whatever_its_attention(tiny):
    inputs = prompt(1, 40)
    other = model("llama", seed=5)
    for implementation in ("sdpa", "elastickv"):
        other.set_attn_implementation(implementation)
        with pytest.raises(UsageError, match="made for"):
            other.generate(**inputs, max_new_tokens=3, past_key_values=cache_of(tiny))
    larger = tf.AutoModelForCausalLM.from_config(
        tf.LlamaConfig(**CONFIGS["llama"]().to_dict() | {"num_hidden_layers": 3})
    ).eval()
    larger.set_attn_implementation("elastickv")
    with pytest.raises(UsageError, match="another model"):
        larger.generate(**inputs, max_new_tokens=3, past_key_values=cache_of(tiny))


def test_a_filled_cache_is_refused_by_another_model_of_the_same_configuration(tiny):
    inputs = prompt(1, 40)
    cache = cache_of(tiny)
    generated = tiny.generate(**inputs, max_new_tokens=3, past_key_values=cache)
    twin = tf.AutoModelForCausalLM.from_config(tiny.config).eval()
    twin.set_attn_implementation("elastickv")
    with pytest.raises(UsageError, match="another model"):
        twin.generate(generated, max_new_tokens=3, past_key_values=cache)


def test_another_batch_is_refused_and_the_cache_still_serves_its_own(tiny):
    cache = cache_of(tiny)
    with torch.no_grad():
        tiny(**prompt(2, 40), past_key_values=cache)
        with pytest.raises(UsageError, match="holds 2 sequences and 3 are given"):
            tiny(prompt(3, 1)["input_ids"], past_key_values=cache)
        tiny(prompt(2, 1)["input_ids"], past_key_values=cache)
    assert cache.lengths == (41, 41)


def test_attention_that_is_not_set_is_refused_with_the_remedy(tiny):
    cache = cache_of(tiny)
    tiny.set_attn_implementation("sdpa")
    with pytest.raises(UsageError, match=r"set_attn_implementation\('elastickv'\)"):
        tiny.generate(**prompt(1, 40), max_new_tokens=3, past_key_values=cache)
    tiny.set_attn_implementation("elastickv")
    cache.reset()
    tiny.generate(**prompt(1, 40), max_new_tokens=3, past_key_values=cache)


def test_gradients_are_refused(tiny):
    with pytest.raises(UsageError, match="no_grad"):
        tiny(**prompt(1, 40), past_key_values=cache_of(tiny))


def counting(tiny):
    calls = []
    handle = tiny.model.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
    return calls, handle


@pytest.mark.parametrize("limit", ["capacity", "positions"])
def test_a_prompt_and_new_tokens_that_will_not_fit_are_refused_before_any_work(limit):
    config = tf.LlamaConfig(**CONFIGS["llama"]().to_dict() | ({"max_position_embeddings": 64} if limit == "positions" else {}))
    tiny = tf.AutoModelForCausalLM.from_config(config).eval()
    options = {"capacity": 64} if limit == "capacity" else {}
    calls, handle = counting(tiny)
    word = "capacity of 64" if limit == "capacity" else "64 positions"
    with pytest.raises(UsageError, match=f"69 tokens .*{word}"):
        tiny.generate(**prompt(1, 50), max_new_tokens=20, past_key_values=cache_of(tiny, **options))
    with pytest.raises(UsageError, match=word):
        tiny.generate(**prompt(1, 70), max_new_tokens=1, past_key_values=cache_of(tiny, **options))
    assert not calls
    cache = cache_of(tiny, **options)
    generated = tiny.generate(**prompt(1, 50), max_new_tokens=15, past_key_values=cache, do_sample=False)
    assert cache.lengths == (64,)
    with pytest.raises(UsageError, match=word):
        tiny.generate(generated, max_new_tokens=2, past_key_values=cache)
    with torch.no_grad(), pytest.raises(UsageError, match=word):
        tiny(prompt(1, 1)["input_ids"], past_key_values=cache)
    assert cache.lengths == (64,)
    # Padding takes no position: 50 positions of padding and 15 of text.
    wide = padded([65, 50])
    wide["attention_mask"][:, :15] = 0
    tiny.generate(**wide, max_new_tokens=15, past_key_values=cache_of(tiny, **options))
    handle.remove()


def test_a_text_that_does_not_continue_the_cached_one_is_refused(tiny):
    cache = cache_of(tiny)
    tiny.generate(**prompt(1, 60), max_new_tokens=3, past_key_values=cache)
    with pytest.raises(UsageError, match="already holds 62 tokens and the prompt has 30"):
        tiny.generate(**prompt(1, 30), max_new_tokens=3, past_key_values=cache)


def test_a_pass_that_broke_off_is_noticed(tiny):
    class Broken(RuntimeError):
        pass

    def stop(*_: Any) -> None:
        raise Broken

    cache = cache_of(tiny)
    handle = tiny.model.layers[0].register_forward_hook(stop)
    with pytest.raises(Broken):
        tiny.generate(**prompt(1, 40), max_new_tokens=3, past_key_values=cache)
    handle.remove()
    with pytest.raises(UsageError, match="broke off"):
        tiny.generate(**prompt(1, 41), max_new_tokens=3, past_key_values=cache)
    cache.reset()
    tiny.generate(**prompt(1, 40), max_new_tokens=3, past_key_values=cache)


def test_masks_that_a_store_cannot_keep_are_refused(tiny):
    inputs = prompt(1, 40)["input_ids"]
    causal = torch.ones(40, 40, dtype=torch.bool).tril()[None, None]
    holed = causal.clone()
    holed[..., -1, 5] = False
    with torch.no_grad():
        with pytest.raises(UsageError, match="hides from the last token"):
            tiny(inputs, attention_mask=holed, past_key_values=cache_of(tiny))
        cache = cache_of(tiny)
        tiny(inputs, attention_mask=causal, past_key_values=cache)
        whole = torch.ones(1, 1, 3, 43, dtype=torch.bool)
        whole[..., -3:] = torch.ones(3, 3, dtype=torch.bool).tril()
        hidden = whole.clone()
        hidden[..., 7] = False
        with pytest.raises(UsageError, match="hides tokens that the cache holds"):
            tiny(inputs[:, :3], attention_mask=hidden, past_key_values=cache)
        cache.reset()
        tiny(inputs, attention_mask=causal, past_key_values=cache)
        tiny(inputs[:, :3], attention_mask=whole, past_key_values=cache)
    assert cache.lengths == (43,)


@pytest.mark.parametrize("device_map", [None, {"model.layers.0": 0, "model.layers.1": 1}])
def test_too_little_memory_tells_how_much_is_needed_and_what_would_fit(tiny, monkeypatch, device_map):
    if device_map:
        monkeypatch.setattr(tiny, "hf_device_map", device_map, raising=False)
    cache = ekv.ElasticCache.for_model(tiny, 1)
    backend = layer_storage.backend_for(torch.device("cpu"))
    needed = backend.cache_bytes(
        layer_storage.AttentionShape(1, 4, 2, 64), 1024, "fp32", cache._config.settle(1000, "fp32").recipes[0]
    )
    cache.reset()

    class Full:
        def __init__(self) -> None:
            self.name = backend.name
            self.device = type("Device", (), {"free_bytes": needed})()
            self.cache, self.cache_bytes = backend.cache, backend.cache_bytes

    monkeypatch.setattr("elastickv.transformers.layer_storage.backend_for", lambda device: Full())
    if device_map:
        # A layer a device: each has what it needs.
        assert tiny.generate(**prompt(1, 1000), max_new_tokens=2, past_key_values=cache).shape == (1, 1002)
        return
    with pytest.raises(UsageError, match=r"need .* GiB in 2 layers and .* are free; compress=\d+ would fit"):
        tiny.generate(**prompt(1, 1000), max_new_tokens=20, past_key_values=cache)


@pytest.mark.parametrize(
    ("device_map", "same_device"),
    [
        (None, [0, 1, 2]),
        ({"": "cuda:0"}, [0, 1, 2]),
        ({"model.layers.0": 0, "model.layers.1": 1, "model.layers.2": 1}, [1, 2]),
        ({"model.layers.0": "cuda:1", "model.layers.1": 1, "model.layers.2": torch.device("cuda", 0)}, [0, 1]),
        # What is offloaded computes on the first GPU.
        ({"model.layers.0": 1, "model.layers.1": "cpu", "model.layers.2": "disk"}, [0, 1, 2]),
        ({"model.layers.0": "cpu", "model.layers.1": "cpu", "model.layers.2": "cpu"}, [0, 1, 2]),
        ({"": "cuda"}, [0, 1, 2]),
        # Experts have numbers too: a layer's comes first.
        ({f"model.layers.{i}.{part}": at for i, at in ((0, 0), (1, 1), (2, 1)) for part in ("experts.1", "attn")}, [1, 2]),
        ({"model.layers.0": "cuda", "model.layers.1": 0, "model.layers.2": "disk"}, [0, 1, 2]),
        ({"model.layers.10": 0, "model.layers.0": 0, "model.layers.1": 1, "model.layers.2": 0}, [1]),
    ],
)
def test_the_memory_of_a_device_is_needed_for_the_layers_that_compute_there(device_map, same_device):
    assert layers_on_same_device(1, (0, 1, 2), device_map) == same_device


def errors_of(tiny: Any, **changes: Any) -> ModelCalibration:
    curve = {1.0: ((0.0, 0.0),) * 2, 0.5: ((1e-3, 4e-3),) * 2, 0.125: ((3e-3, 4e-2),) * 2}
    none, little = ((0.0, 0.0),) * 2, ((1e-5, 1e-5),) * 2
    fields: dict[str, Any] = {
        "model": "tiny",
        "fingerprint": fingerprint(tiny),
        "layers": (0, 1),
        "query_heads": 4,
        "kv_heads": 2,
        "head_dim": 64,
        "text": "a text",
        "tokens": 100,
        "queries": 10,
        "pages": {1: curve, 4: curve},
        "keys": {"int8": none, "int4": little},
        "values": {"int8": none, "int4/32": little},
    }
    return ModelCalibration(**fields | changes)


def test_a_calibration_gives_heads_shares_of_their_own_without_a_warning(tiny, tmp_path, recwarn):
    file = tmp_path / "tiny.calibration.json"
    file.write_text(errors_of(tiny).dumps())
    for options in ({"calibration": file}, {"recipe": file}, {"calibration": errors_of(tiny)}):
        cache = ekv.ElasticCache.for_model(tiny, 6, **options)
        tiny.generate(**prompt(1, 2000), max_new_tokens=3, past_key_values=cache)
        report = cache.report()
        assert report.calibrated
        assert report.recipes[0].fractions[0] != report.recipes[0].fractions[1]
        assert all(row.read_ratio >= 6 for row in report.by_context if not row.everything)
        cache.save(tmp_path / "cache")
        again = ekv.ElasticCache.load(tmp_path / "cache", tiny)
        assert again.recipes == cache.recipes
        again.reset()
        assert again.report().calibrated
    assert not [w for w in recwarn if issubclass(w.category, ekv.UncalibratedWarning)]


def test_a_calibration_of_another_model_or_version_is_refused(tiny, tmp_path):
    with pytest.raises(UsageError, match="not of LlamaForCausalLM"):
        ekv.ElasticCache.for_model(tiny, 4, calibration=errors_of(tiny, fingerprint="0" * 16))
    with pytest.raises(UsageError, match="layers or heads differ"):
        ekv.ElasticCache.for_model(tiny, 4, calibration=errors_of(tiny, query_heads=8))
    file = tmp_path / "old.json"
    file.write_text(errors_of(tiny).dumps().replace('"version": 1', '"version": 99'))
    with pytest.raises(UsageError, match="version 99"):
        ekv.ElasticCache.for_model(tiny, 4, calibration=file)
    with pytest.raises(UsageError, match="give compress too"):
        ekv.ElasticCache.for_model(tiny, recipe="int8", calibration=errors_of(tiny))
    assert tiny.config._attn_implementation == "sdpa"


def test_keys_on_another_device_than_the_tokens_before_are_refused(tiny):
    cache = cache_of(tiny)
    tiny.generate(**prompt(1, 40), max_new_tokens=2, past_key_values=cache)
    layer, elsewhere = cache.elastic_layers[0], torch.empty(1, 2, 1, 64, device="meta")
    said = r"the cache is on cpu, and keys on meta are given: .* move the model back"
    with pytest.raises(UsageError, match=said):
        layer.update(elsewhere, elsewhere)
    layer.store, layer.held = None, (torch.zeros(1, 2, 41, 64),) * 2
    with pytest.raises(UsageError, match=said):
        layer.update(elsewhere, elsewhere)


def test_a_cache_keeps_no_model_alive():
    made = model("llama")
    cache = cache_of(made)
    made.generate(**prompt(1, 30), max_new_tokens=3, past_key_values=cache)
    alive = weakref.ref(made)
    del made
    import gc

    gc.collect()
    assert alive() is None
    assert cache.lengths == (32,)


def test_a_calibration_chooses_formats_that_the_models_device_reads(tiny, tmp_path):
    little = ((1e-9, 1e-9),) * 2
    errors = errors_of(tiny, values={"int8": little, "int4/64": little, "int3/64": little})
    cache = ekv.ElasticCache.for_model(tiny, 3, calibration=errors)
    with torch.no_grad():
        tiny(**prompt(1, 300), past_key_values=cache)
    assert {recipe.value_format for recipe in cache.recipes.values()} == {"int3"}
    assert {layer.store.cache.recipe.value_format for layer in cache.elastic_layers} == {"int3"}
    cache.save(tmp_path / "cache")
    loaded = ekv.ElasticCache.load(tmp_path / "cache", tiny)
    loaded.reset()
    for again in (loaded, cache.another()):
        on_cpu = again._config.settle(300, "bf16", "cpu")
        assert {recipe.value_format for recipe in on_cpu.recipes.values()} == {"int3"}
    moved = cache.another()._config.settle(300, "bf16", "cuda")
    assert {recipe.value_format for recipe in moved.recipes.values()} == {"int4"}
