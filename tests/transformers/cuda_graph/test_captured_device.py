"""Captured decodes on a GPU, as CUDA graphs."""

import copy
import gc
import warnings

import pytest
import torch
import transformers as tf

import elastickv.transformers as ekv
from elastickv.errors import UsageError
from tests.helpers.captured_decode import Swerve
from tests.helpers.model_matrix import model, padded, prompt

pytestmark = pytest.mark.gpu
CAPTURED = [
    "llama",
    "llama-mha",
    "llama-mqa",
    "llama-small-heads",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "smollm3",
    "granite",
    "olmo2",
]
RECIPES = ["int4,pages=1/4", "int4", "int8", "fp8", "dense", "k=int8,v=int4", "k=int8_per_channel,v=int8"]


@pytest.fixture(autouse=True)
def device():
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ekv.UncalibratedWarning)
        yield torch.device("cuda", torch.cuda.current_device())


def on_device(name, dtype=torch.bfloat16):
    return model(name).to("cuda", dtype)


@pytest.fixture
def tiny(device):
    return on_device("llama")


def generate(made, inputs, count=24, **options):
    return made.generate(
        **{n: t.to("cuda") for n, t in inputs.items()}, max_new_tokens=count, **({"do_sample": False} | options)
    )


def both(made, inputs, count=24, wanted=None, **options):
    """Return tokens of an uncaptured and a captured generate, and the latter's cache."""
    runs = []
    for capture in (False, True):
        torch.manual_seed(3)
        cache = ekv.ElasticCache.for_model(made, capture=capture, **(wanted or {"compress": 4}))
        runs.append(generate(made, inputs, count, past_key_values=cache, **options))
    return *runs, cache


@pytest.mark.parametrize("name", CAPTURED)
def test_tokens_are_the_uncaptured_ones(name):
    plain, tokens, cache = both(on_device(name), padded([700, 543]))
    assert torch.equal(tokens, plain)
    report = cache.report()
    assert (report.captured, report.decodes, report.not_captured) == (22, 23, None)


@pytest.mark.usefixtures("two_gpus")
def test_a_model_may_be_on_another_device_than_the_current_one(device):
    other = torch.device("cuda", 1 - device.index)
    made = model("llama").to(other, torch.bfloat16)
    inputs, runs = {n: t.to(other) for n, t in padded([700, 543]).items()}, []
    for capture in (False, True):
        cache = ekv.ElasticCache.for_model(made, compress=4, capture=capture)
        runs.append(made.generate(**inputs, max_new_tokens=24, do_sample=False, past_key_values=cache))
    assert torch.equal(*runs)
    assert cache.report().captured == 22
    assert torch.cuda.current_device() == device.index


def test_a_model_that_was_moved_between_turns_is_refused(tiny):
    inputs = prompt(1, 100)
    cache = ekv.ElasticCache.for_model(tiny, 2)
    generate(tiny, inputs, 3, past_key_values=cache)
    with pytest.raises(UsageError, match=r"the cache is on cuda:[0-9]+, and keys on cpu are given"):
        tiny.to("cpu").generate(**prompt(1, 110), max_new_tokens=3, past_key_values=cache)
    generate(tiny.to("cuda"), prompt(1, 110), 3, past_key_values=cache)


def on_two_gpus():
    accelerate = pytest.importorskip("accelerate")
    made = on_device("llama")
    device_map = {name: 0 for name, _ in made.model.named_children() if name != "layers"} | {"layers.0": 0}
    device_map |= {f"layers.{i}": 1 for i in range(1, len(made.model.layers))} | {"norm": 1}
    return accelerate.dispatch_model(made, {f"model.{name}": gpu for name, gpu in device_map.items()} | {"lm_head": 1})


@pytest.mark.usefixtures("two_gpus")
def test_a_cache_of_a_model_on_two_gpus_is_saved_and_goes_on(tmp_path):
    made, runs = on_two_gpus(), []
    cache = ekv.ElasticCache.for_model(made, 4)
    start = generate(made, prompt(1, 700), 4, past_key_values=cache)
    cache.save(tmp_path / "cache")
    for one in (cache, ekv.ElasticCache.load(tmp_path / "cache", made)):
        assert [layer.store.device.index for layer in one.elastic_layers] == [0, 1]
        inputs = {"input_ids": start, "attention_mask": torch.ones_like(start)}
        runs.append(generate(made, inputs, 8, past_key_values=one))
    assert torch.equal(*runs)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("text", RECIPES)
def test_a_model_may_be_on_two_gpus(text):
    runs, inputs = [], padded([700, 543])
    for made in (on_device("llama"), on_two_gpus()):
        cache = ekv.ElasticCache.for_model(made, recipe=text)
        runs.append(generate(made, inputs, past_key_values=cache).cpu())
    assert torch.equal(*runs)
    report = cache.report()
    assert "placed by accelerate" in report.not_captured
    assert 0 < report.quantize_seconds < report.prompt_seconds
    assert {str(layer.store.device) for layer in cache.elastic_layers} == {"cuda:0", "cuda:1"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_are_captured(dtype):
    plain, tokens, cache = both(on_device("llama", dtype), padded([300, 243]))
    assert torch.equal(tokens, plain)
    assert cache.report().captured == 22


@pytest.mark.parametrize("text", RECIPES)
def test_every_recipe_is_captured(tiny, text):
    plain, tokens, cache = both(tiny, padded([400, 343]), 70, wanted={"recipe": text})
    assert torch.equal(tokens, plain)
    assert cache.report().captured == 68


def held(cache):
    """Return copies of everything that a cache's layers store."""
    last = max(cache.lengths)
    return [tensor for layer in cache.elastic_layers for tensor in layer.store.read(0, last)]


@pytest.mark.parametrize("text", [*RECIPES, "int4,pages=1/4,anchor_every=4", "int8,reuse,anchor_every=3", "fp8,window=0"])
@pytest.mark.parametrize("start", [306, 325, 334])
def test_decodes_launched_speculatively_leave_no_trace(tiny, text, start):
    inputs, options = prompt(2, 290), {"logits_processor": tf.LogitsProcessorList([Swerve(start)])}
    runs = []
    for capture in (False, True):
        cache = ekv.ElasticCache.for_model(tiny, recipe=text, capture=capture)
        tokens = generate(tiny, inputs, 60, past_key_values=cache, **options)
        runs.append((tokens, held(cache), cache))
    (plain, stored, _), (tokens, same, cache) = runs
    assert torch.equal(tokens, plain)
    assert all(torch.equal(a, b) for a, b in zip(same, stored, strict=True))
    assert 0 < cache.report().ahead < 60 - 10
    assert cache.lengths == (349, 349)


def test_greedy_texts_are_launched_speculatively(tiny):
    plain, tokens, cache = both(tiny, prompt(1, 400), 80)
    assert torch.equal(tokens, plain)
    assert cache.report().ahead == 79 - 3
    cache.reset()
    assert cache.backends.in_flight is None


def test_a_decode_in_flight_does_not_write_to_freed_memory(tiny):
    for _ in range(20):
        cache = ekv.ElasticCache.for_model(tiny, 4)
        with torch.no_grad():
            ids = prompt(1, 600)["input_ids"].to("cuda")
            for _ in range(6):
                ids = tiny(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        assert cache.backends.in_flight is not None
        del cache
        taken = [torch.zeros(1 << 18, device="cuda") for _ in range(16)]
        torch.cuda.synchronize()
        assert not any(tensor.any() for tensor in taken)


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss", "gemma2"])
def test_windowed_layers_fall_back_and_say_so(name):
    made = on_device(name)
    with pytest.warns(ekv.NotCapturedWarning, match="window"):
        plain, tokens, cache = both(made, padded([200, 143]))
    assert torch.equal(tokens, plain)
    assert cache.report().captured == 0


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_the_framework_chooses_tokens(tiny, options):
    plain, tokens, cache = both(tiny, padded([300, 243]), **options)
    assert torch.equal(tokens, plain)
    assert cache.report().captured == 22


def test_a_cache_that_grows_is_captured_again(tiny):
    texts = []
    for capture in (False, True):
        cache = ekv.ElasticCache.for_model(tiny, 4, capture=capture)
        ids, text = prompt(1, 40)["input_ids"].cuda(), []
        with torch.no_grad():
            for _ in range(700):
                ids = tiny(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)
                text.append(ids)
        texts.append(torch.cat(text).cpu())
    assert torch.equal(*texts)
    assert cache.report().captured >= 690


def test_turns_go_on_with_one_cache(tiny):
    texts = []
    for capture in (False, True):
        cache = ekv.ElasticCache.for_model(tiny, 4, capture=capture)
        ids = prompt(2, 300)["input_ids"]
        for seed in range(3):
            ids = generate(tiny, {"input_ids": ids}, 12, past_key_values=cache).cpu()
            ids = torch.cat([ids, prompt(2, 5, seed)["input_ids"]], dim=1)
        texts.append(ids)
    assert torch.equal(*texts)
    assert cache.report().captured >= 27


def test_copies_resets_and_files_are_captured_again(tiny, tmp_path):
    cache = ekv.ElasticCache.for_model(tiny, 4)
    text = generate(tiny, prompt(1, 300), past_key_values=cache).cpu()
    inputs = {"input_ids": torch.cat([text, prompt(1, 3, 5)["input_ids"]], dim=1)}
    other = copy.deepcopy(cache)
    cache.save(tmp_path / "cache")
    loaded = ekv.ElasticCache.load(tmp_path / "cache", tiny)
    plain = ekv.ElasticCache.load(tmp_path / "cache", tiny, capture=False)
    expected = generate(tiny, inputs, past_key_values=plain)
    for held in (cache, other, loaded):
        assert torch.equal(generate(tiny, inputs, past_key_values=held), expected)
    cache.reset()
    assert torch.equal(generate(tiny, prompt(1, 300), past_key_values=cache).cpu(), text)


def test_caches_may_take_turns(tiny):
    expected = [
        generate(tiny, prompt(1, 200, seed), past_key_values=ekv.ElasticCache.for_model(tiny, 4, capture=False))
        for seed in (1, 2)
    ]
    caches = [ekv.ElasticCache.for_model(tiny, 4) for _ in expected]
    texts = [prompt(1, 200, seed)["input_ids"] for seed in (1, 2)]
    for _ in range(4):
        texts = [
            generate(tiny, {"input_ids": ids}, 6, past_key_values=held).cpu() for ids, held in zip(texts, caches, strict=True)
        ]
    assert [text.tolist() for text in texts] == [text.tolist() for text in expected]


def test_another_stream_and_inference_mode_do(tiny):
    plain, _, _ = both(tiny, prompt(1, 300))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.inference_mode():
        cache = ekv.ElasticCache.for_model(tiny, 4)
        assert torch.equal(generate(tiny, prompt(1, 300), past_key_values=cache), plain)
    torch.cuda.current_stream().wait_stream(stream)
    assert cache.report().captured == 22


def test_outputs_outlive_the_next_replay(tiny):
    cache = ekv.ElasticCache.for_model(tiny, 4)
    ids = generate(tiny, prompt(1, 100), 8, past_key_values=cache)[:, -1:]
    with torch.no_grad():
        outputs = [tiny(input_ids=ids, past_key_values=cache, output_hidden_states=True) for _ in range(5)]
        copies = [output.logits.clone() for output in outputs]
        tiny(input_ids=ids, past_key_values=cache, output_hidden_states=True)
    assert all(torch.equal(output.logits, logits) for output, logits in zip(outputs, copies, strict=True))
    assert not torch.equal(copies[-1], copies[-2])


def test_memory_is_freed_with_the_cache(tiny):
    def one():
        cache = ekv.ElasticCache.for_model(tiny, 4)
        generate(tiny, prompt(2, 700), past_key_values=cache)
        assert cache.report().captured == 22

    def held():
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    one()
    before = held()
    for _ in range(3):
        one()
    assert held() == before


def test_a_model_that_waits_for_the_device_is_not_captured(tiny, monkeypatch):
    norm = tiny.model.norm
    plain, _, _ = both(tiny, prompt(1, 300))
    forward = norm.forward

    def waiting(states):
        assert states.sum().item() == states.sum().item()
        return forward(states)

    monkeypatch.setattr(norm, "forward", waiting)
    with pytest.warns(ekv.NotCapturedWarning, match=r"waits for the device \(.*test_captured_device\.py"):
        _, tokens, cache = both(tiny, prompt(1, 300))
    assert torch.equal(tokens, plain)
    assert cache.report().captured == 0


def test_a_capture_that_breaks_off_leaves_everything_usable(tiny, monkeypatch):
    norm = tiny.model.norm
    sampled, _, _ = both(tiny, prompt(1, 300), do_sample=True)
    forward = norm.forward

    def breaking(states):
        torch.cuda.synchronize()
        return forward(states)

    with monkeypatch.context() as patch:
        patch.setattr(norm, "forward", breaking)
        with pytest.warns(ekv.NotCapturedWarning, match="capture failed|waits"):
            _, tokens, cache = both(tiny, prompt(1, 300), do_sample=True)
        assert torch.equal(tokens, sampled)
        assert cache.report().captured == 0
    del cache
    gc.collect()
    torch.cuda.empty_cache()
    plain, tokens, cache = both(tiny, prompt(1, 300), do_sample=True)
    assert torch.equal(tokens, plain)
    assert cache.report().captured == 22


def test_a_block_restores_the_model(tiny):
    before = tiny.config._attn_implementation
    with ekv.elastic(tiny, compress=4) as session:
        generate(tiny, prompt(1, 300))
        assert session.report().captured == 22
    assert "forward" not in vars(tiny)
    assert tiny.config._attn_implementation == before
    ekv.ElasticCache.for_model(tiny, 4)
    ekv.release(tiny)
    assert "forward" not in vars(tiny)
    stock = generate(tiny, prompt(1, 300))
    assert stock.shape == (1, 324)


def test_text_is_streamed(tiny):
    class Streamer:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer = Streamer()
    cache = ekv.ElasticCache.for_model(tiny, 4)
    tokens = generate(tiny, prompt(1, 100), past_key_values=cache, streamer=streamer)
    assert streamer.tokens == tokens[0].tolist()
    assert cache.report().captured == 22


def test_assisted_decoding_goes_on(tiny):
    plain = generate(
        tiny, prompt(1, 100), past_key_values=ekv.ElasticCache.for_model(tiny, 1, capture=False), prompt_lookup_num_tokens=3
    )
    cache = ekv.ElasticCache.for_model(tiny, 1)
    assert torch.equal(generate(tiny, prompt(1, 100), past_key_values=cache, prompt_lookup_num_tokens=3), plain)


def test_long_rope_that_changes_its_frequencies_is_captured_with_them_or_not_at_all():
    """Releases before 5.24 read the largest position from the device; later ones decide on the device."""
    config = tf.Phi3Config(
        **model("phi3").config.to_dict()
        | {
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
                "short_factor": [1.0] * 32,
                "long_factor": [2.0] * 32,
                "original_max_position_embeddings": 2048,
            },
        }
    )
    made = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().to("cuda")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ekv.NotCapturedWarning)
        plain, tokens, cache = both(made, prompt(1, 2035))
    assert torch.equal(tokens, plain)  # across the 2048th token, where the frequencies change
    messages = [str(one.message) for one in caught if issubclass(one.category, ekv.NotCapturedWarning)]
    assert bool(messages) != bool(cache.report().captured)
    assert all("waits for the device" in one or "capture failed" in one for one in messages)
