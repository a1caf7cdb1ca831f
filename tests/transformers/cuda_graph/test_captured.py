"""Captured decodes, with a recorder that replays by running the pass again; test_captured_device.py has graphs."""

import contextlib
import copy
import functools
import gc
import inspect
import pickle
import warnings
import weakref

import pytest
import torch
import transformers as tf
from transformers.modeling_outputs import CausalLMOutputWithPast

import elastickv.transformers as ekv
from elastickv.errors import NonFiniteError, UsageError
from elastickv.model_benchmark import generation
from elastickv.transformers.cache_argument import cache_in
from elastickv.transformers.cuda_graph import captured
from elastickv.transformers.cuda_graph import recorder as recorders
from elastickv.transformers.layer_storage import LayerStorage
from tests.helpers.captured_decode import FakeRecorder, queue_nothing
from tests.helpers.model_matrix import model, padded, prompt

FULL = ["llama", "llama-mqa", "llama-small-heads", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "granite", "olmo2"]


@pytest.fixture
def recorder(monkeypatch):
    made = FakeRecorder()
    for module in (captured, recorders):
        monkeypatch.setattr(module, "recorder_for", lambda device: made)
    return made


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ekv.UncalibratedWarning)
        yield


@pytest.fixture
def tiny():
    return model("llama")


def generate(tiny, inputs, count=20, **options):
    return tiny.generate(**inputs, max_new_tokens=count, **({"do_sample": False} | options))


def both(tiny, inputs, compress=4, count=20, **options):
    """Return tokens of an eager and a captured generate, and the latter's cache."""
    runs = []
    for capture in (False, True):
        torch.manual_seed(3)
        cache = ekv.ElasticCache.for_model(tiny, compress, capture=capture)
        runs.append(generate(tiny, inputs, count, past_key_values=cache, **options))
    return *runs, cache


@contextlib.contextmanager
def not_captured(match):
    with pytest.warns(ekv.NotCapturedWarning, match=match):
        yield


class TestTokens:
    @pytest.mark.parametrize("name", FULL)
    def test_they_are_the_eager_ones(self, recorder, name):
        eager, tokens, cache = both(model(name), padded([270, 193]))
        assert torch.equal(tokens, eager)
        # The prompt makes the first token; of 19 decodes one is a rehearsal.
        assert recorder.rehearsed == recorder.recorded == 1
        assert recorder.replayed == cache.report().captured == 18

    @pytest.mark.parametrize(
        "options",
        [
            {"do_sample": True, "top_k": 20},
            {"num_beams": 3},
            {"num_beams": 2, "num_return_sequences": 2},
            {"do_sample": True, "num_return_sequences": 3},
            {"repetition_penalty": 1.5, "min_new_tokens": 5},
        ],
        ids=str,
    )
    def test_the_framework_chooses_them(self, recorder, tiny, options):
        eager, tokens, cache = both(tiny, padded([200, 143]), **options)
        assert torch.equal(tokens, eager)
        assert cache.report().captured == 18

    def test_turns_chunks_and_several_generates_go_on_with_one_cache(self, recorder, tiny):
        texts = []
        for capture in (False, True):
            cache = ekv.ElasticCache.for_model(tiny, 4, capture=capture)
            ids = prompt(2, 200)["input_ids"]
            for seed in range(3):
                ids = generate(tiny, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 10, past_key_values=cache)
                ids = torch.cat([ids, prompt(2, 5, seed)["input_ids"]], dim=1)
            texts.append(ids)
        assert torch.equal(*texts)
        assert cache.report().captured == 26
        assert recorder.rehearsed == 1

    def test_a_cache_that_grows_is_recorded_again(self, recorder, tiny):
        texts = []
        for capture in (False, True):
            cache = ekv.ElasticCache.for_model(tiny, 4, capture=capture)
            inputs, text = prompt(1, 40)["input_ids"], []
            with torch.no_grad():
                for _ in range(320):
                    inputs = tiny(input_ids=inputs, past_key_values=cache).logits[:, -1:].argmax(-1)
                    text.append(int(inputs))
            texts.append(text)
        assert texts[0] == texts[1]
        assert recorder.recorded == 2
        assert cache.report().captured == 317

    def test_a_prompt_of_one_token_is_one(self, recorder, tiny):
        eager, tokens, _ = both(tiny, prompt(1, 1))
        assert torch.equal(tokens, eager)

    def test_a_reset_cache_is_recorded_again(self, recorder, tiny):
        cache = ekv.ElasticCache.for_model(tiny, 4)
        first = generate(tiny, prompt(1, 200), past_key_values=cache)
        cache.reset()
        assert torch.equal(generate(tiny, prompt(1, 200), past_key_values=cache), first)
        assert recorder.recorded == 2

    def test_a_copy_has_graphs_of_its_own(self, recorder, tiny):
        cache = ekv.ElasticCache.for_model(tiny, 4)
        text = generate(tiny, prompt(1, 200), past_key_values=cache)
        other = copy.deepcopy(cache)
        inputs = {"input_ids": torch.cat([text, prompt(1, 3, 5)["input_ids"]], dim=1)}
        assert torch.equal(generate(tiny, inputs, past_key_values=cache), generate(tiny, inputs, past_key_values=other))
        assert recorder.recorded == 2

    def test_a_loaded_cache_is_captured(self, recorder, tiny, tmp_path):
        cache = ekv.ElasticCache.for_model(tiny, 4)
        text = generate(tiny, prompt(1, 200), past_key_values=cache)
        cache.save(tmp_path / "cache")
        other = ekv.ElasticCache.load(tmp_path / "cache", tiny)
        inputs = {"input_ids": torch.cat([text, prompt(1, 3, 5)["input_ids"]], dim=1)}
        assert torch.equal(generate(tiny, inputs, past_key_values=cache), generate(tiny, inputs, past_key_values=other))
        assert other.report().captured == 18


class TestCounting:
    def test_reports_are_the_same(self, recorder, tiny):
        reports = []
        for capture in (False, True):
            cache = ekv.ElasticCache.for_model(tiny, 4, capture=capture)
            generate(tiny, padded([700, 650]), 70, past_key_values=cache)
            reports.append(cache.report())
        eager, replayed = reports
        assert (replayed.decodes, replayed.lengths, replayed.chunks) == (eager.decodes, eager.lengths, 0)
        assert replayed.read_bytes == eager.read_bytes
        assert (replayed.captured, replayed.not_captured, eager.captured) == (68, None, 0)
        assert eager.not_captured == "capture=False"
        assert "68 of them captured" in str(replayed)
        assert "0 of them captured: capture=False" in str(eager)

    def test_recording_counts_nothing(self, recorder, tiny, monkeypatch):
        cache = ekv.ElasticCache.for_model(tiny, 4)
        seen = []
        record = recorder.record

        def watched(run):
            before = (cache.lengths, cache.get_seq_length(), cache._ledger.steps)
            replay = record(run)
            seen.append(before == (cache.lengths, cache.get_seq_length(), cache._ledger.steps))
            return replay

        recorder.record = watched
        generate(tiny, prompt(1, 200), past_key_values=cache)
        assert seen == [True]

    def test_values_that_are_not_finite_are_reported(self, recorder, tiny):
        cache = ekv.ElasticCache.for_model(tiny, 4)
        text = generate(tiny, prompt(1, 100), 5, past_key_values=cache)
        with torch.no_grad():
            tiny.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
        with pytest.raises(NonFiniteError, match="layer 1"):
            generate(tiny, {"input_ids": text}, 64, past_key_values=cache)

    def test_the_capacity_is_respected(self, recorder, tiny):
        cache = ekv.ElasticCache.for_model(tiny, 4, capacity=50)
        ids = prompt(1, 40)["input_ids"]
        with torch.no_grad():
            for _ in range(11):
                ids = tiny(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            with pytest.raises(UsageError, match="51 tokens"):
                tiny(input_ids=ids, past_key_values=cache)
        assert cache.report().captured == 9
        assert cache.lengths == (50,)


class TestOutputs:
    def step(self, tiny, cache, **options):
        with torch.no_grad():
            return tiny(input_ids=prompt(1, 1)["input_ids"], past_key_values=cache, **options)

    def test_they_are_of_the_models_class_and_hold_the_cache(self, recorder, tiny):
        cache = ekv.ElasticCache.for_model(tiny, 4)
        generate(tiny, prompt(1, 100), 5, past_key_values=cache)
        output = self.step(tiny, cache)
        assert type(output) is CausalLMOutputWithPast
        assert cache_in(output) is cache
        before = output.logits.clone()
        self.step(tiny, cache)
        assert torch.equal(output.logits, before)

    def test_tuples_and_hidden_states_come_too(self, recorder, tiny):
        cache = ekv.ElasticCache.for_model(tiny, 4)
        generate(tiny, prompt(1, 100), 5, past_key_values=cache)
        for _ in range(3):
            logits, held, states = self.step(tiny, cache, return_dict=False, output_hidden_states=True)
        assert held is cache
        assert logits.shape == (1, 1, 211)
        assert len(states) == 3
        assert recorder.recorded == 2

    def test_calls_that_take_turns_keep_their_graphs(self, recorder, tiny):
        cache = ekv.ElasticCache.for_model(tiny, 4)
        generate(tiny, prompt(1, 100), 5, past_key_values=cache)
        for _ in range(2):
            for options in ({}, {"return_dict": False}):
                self.step(tiny, cache, **options)
                self.step(tiny, cache, **options)
        assert recorder.recorded == 3

    def test_arguments_may_come_in_order(self, recorder, tiny):
        cache = ekv.ElasticCache.for_model(tiny, 4)
        generate(tiny, prompt(1, 100), 5, past_key_values=cache)
        before = cache.report().captured
        with torch.inference_mode():
            for _ in range(3):
                tiny(prompt(1, 1)["input_ids"], None, torch.tensor([[cache.get_seq_length()]]), cache)
        assert cache.report().captured == before + 2
        self.step(tiny, cache)


class TestFallback:
    def same(self, tiny, match, **options):
        inputs = prompt(1, 200)
        eager = generate(tiny, inputs, past_key_values=ekv.ElasticCache.for_model(tiny, 4, capture=False), **options)
        cache = ekv.ElasticCache.for_model(tiny, 4)
        with not_captured(match):
            assert torch.equal(generate(tiny, inputs, past_key_values=cache, **options), eager)
        report = cache.report()
        assert (report.captured, report.decodes) == (0, 19)
        return report.not_captured

    def test_a_capture_that_fails(self, recorder, tiny):
        recorder.fails = RuntimeError("operation not permitted\nand more")
        assert "RuntimeError: operation not permitted" in self.same(tiny, "the capture failed: RuntimeError")
        assert recorder.recorded == 1

    def test_a_model_that_waits_for_the_device(self, recorder, tiny):
        recorder.waits = "modeling_tiny.py:7"
        self.same(tiny, r"waits for the device \(modeling_tiny\.py:7\)")

    def test_a_model_that_computes_with_the_number_of_tokens(self, recorder, tiny):
        forward = tiny.forward

        @functools.wraps(forward)
        def counting(*args, **kwargs):
            cache_in(kwargs).get_seq_length()
            return forward(*args, **kwargs)

        tiny.forward = counting
        self.same(tiny, "number of tokens")

    def test_a_module_with_a_users_hook(self, recorder, tiny):
        tiny.lm_head.register_forward_hook(lambda module, inputs, output: None)
        self.same(tiny, "a Linear has a hook")

    @pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
    def test_layers_that_keep_the_stock_cache(self, recorder, name):
        self.same(model(name), "window or linear attention")

    def test_capped_scores(self, recorder):
        made = tf.AutoModelForCausalLM.from_config(
            tf.Gemma2Config(**model("gemma2").config.to_dict() | {"layer_types": ["full_attention"] * 2})
        ).eval()
        made.set_attn_implementation("eager")
        cache = ekv.ElasticCache.for_model(made, 4)
        with not_captured("caps scores"):
            generate(made, prompt(1, 200), past_key_values=cache)
        assert cache.report().not_captured == "its attention caps scores"

    def test_gradients_and_autocast(self, recorder, tiny):
        tiny.requires_grad_(False)
        cache = ekv.ElasticCache.for_model(tiny, 4)
        ids = generate(tiny, prompt(1, 100), 2, past_key_values=cache)[:, -1:]
        with not_captured("gradients are enabled"):
            tiny(input_ids=ids, past_key_values=cache)
        assert cache.lengths == (102,)

    def test_a_padded_row_is_not_stored(self, recorder, tiny):
        texts = []
        for capture in (False, True):
            cache = ekv.ElasticCache.for_model(tiny, 4, capture=capture)
            generate(tiny, prompt(2, 100), 10, past_key_values=cache)
            mask = torch.ones(2, 110, dtype=torch.int64)
            mask[1, -1] = 0
            with torch.no_grad():
                logits = tiny(
                    input_ids=prompt(2, 1)["input_ids"],
                    attention_mask=mask,
                    position_ids=torch.tensor([[109], [109]]),
                    past_key_values=cache,
                ).logits
            assert cache.lengths == (110, 109)
            texts.append(logits[0])
        assert torch.equal(*texts)

    def test_on_the_cpu_nothing_is_captured_and_nobody_warned(self, tiny):
        cache = ekv.ElasticCache.for_model(tiny, 4)
        assert "forward" not in vars(tiny)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ekv.NotCapturedWarning)
            generate(tiny, prompt(1, 100), past_key_values=cache)
        report = cache.report()
        assert (report.captured, report.not_captured) == (0, "the model is on the cpu")

    def test_a_pass_that_breaks_off_is_reported_and_the_model_still_works(self, recorder, tiny):
        cache = ekv.ElasticCache.for_model(tiny, 4)
        ids = generate(tiny, prompt(1, 100), 1, past_key_values=cache)[:, -1:]
        mlp = tiny.model.layers[0].mlp
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(mlp, "forward", lambda x: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                tiny(input_ids=ids, past_key_values=cache)
        with torch.no_grad(), pytest.raises(UsageError, match="broke off"):
            tiny(input_ids=ids, past_key_values=cache)
        cache.reset()
        eager, tokens, _ = both(tiny, prompt(1, 200))
        assert torch.equal(tokens, eager)


class TestMasks:
    def test_one_that_contradicts_stored_padding_is_refused_by_a_replay_too(self, recorder, tiny):
        cache, inputs = ekv.ElasticCache.for_model(tiny, 1), padded([60, 41])
        mask, one = inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)

        def decode(mask):
            return tiny(one, attention_mask=mask, position_ids=mask.cumsum(1)[:, -1:] - 1, past_key_values=cache)

        with torch.no_grad():
            tiny(**inputs, past_key_values=cache)
            for _ in range(3):
                mask = torch.cat([mask, one], dim=1)
                decode(mask)
            assert recorder.replayed == 2
            longer = torch.cat([mask, one], dim=1)
            hides, shows = longer.clone(), longer.clone()
            hides[0, 5], shows[1, 5] = 0, 1
            for wrong in (hides, shows):
                with pytest.raises(UsageError, match="hides tokens that the cache holds, or shows what was padding"):
                    decode(wrong)
            decode(longer)
        assert recorder.replayed == 3
        assert cache.lengths == (64, 45)


class TestModelPatch:
    def test_the_signature_stays(self, recorder, tiny):
        before = inspect.signature(tiny.forward)
        ekv.ElasticCache.for_model(tiny, 4)
        assert inspect.signature(tiny.forward) == before

    def test_it_is_put_in_once_and_taken_out(self, recorder, tiny):
        ekv.ElasticCache.for_model(tiny, 4)
        first = vars(tiny)["forward"]
        ekv.ElasticCache.for_model(tiny, 4)
        assert vars(tiny)["forward"] is first
        ekv.release(tiny)
        assert "forward" not in vars(tiny)
        assert tiny.config._attn_implementation == "sdpa"
        ekv.release(tiny)

    def test_capture_false_leaves_the_forward_alone(self, recorder, tiny):
        ekv.ElasticCache.for_model(tiny, 4, capture=False)
        assert "forward" not in vars(tiny)

    def test_a_forward_of_the_instances_own_is_retained(self, recorder, tiny):
        calls = []
        forward = tiny.forward

        @functools.wraps(forward)
        def own(*args, **kwargs):
            calls.append(1)
            return forward(*args, **kwargs)

        tiny.forward = own
        with ekv.elastic(tiny, compress=4):
            generate(tiny, prompt(1, 100), 5)
            # Prompt, first decode, rehearsal, and the recording with its one replay by the double.
            assert recorder.replayed == 3
            assert len(calls) == 6
        assert tiny.forward is own

    def test_a_block_restores_what_was_there(self, recorder, tiny):
        with ekv.elastic(tiny, compress=4) as session:
            generate(tiny, prompt(1, 100), 5)
            assert session.report().captured == 3
        assert "forward" not in vars(tiny)
        with pytest.raises(KeyboardInterrupt), ekv.elastic(tiny, compress=4):
            raise KeyboardInterrupt
        assert "forward" not in vars(tiny)
        ekv.ElasticCache.for_model(tiny, 4)
        outer = vars(tiny)["forward"]
        with ekv.elastic(tiny, compress=4, capture=False):
            pass
        assert vars(tiny)["forward"] is outer

    def test_other_caches_and_none_work_as_before(self, recorder, tiny):
        inputs = padded([70, 41])
        stock = generate(tiny, inputs)
        ekv.ElasticCache.for_model(tiny, 4)
        assert torch.equal(generate(tiny, inputs), stock)
        assert torch.equal(generate(tiny, inputs, use_cache=False), stock)
        assert recorder.replayed == 0

    def test_stock_texts_that_take_turns_run_without_it(self, recorder, tiny):
        ids, sampling = prompt(1, 200)["input_ids"], generation.Sampling(ends=False)
        mask = torch.ones_like(ids)
        stock = generation.stock(tiny, ids, mask, sampling)
        ours = generation.elastic(tiny, ids, mask, sampling, 256, {"compress": 4})
        for text in (ours, stock, ours):
            text.advance(8)
            assert ("forward" in vars(tiny)) == (text is ours)
        assert ours.metrics()["captured_share"] == 14 / 15

    def test_the_model_is_freed_with_its_last_reference(self, recorder):
        made = model("llama")
        cache = ekv.ElasticCache.for_model(made, 4)
        gc.collect()
        gc.disable()
        try:
            gone = weakref.ref(made)
            del made
            assert gone() is None
        finally:
            gc.enable()
        assert cache.lengths == ()

    def test_a_graph_keeps_no_cache_alive(self, recorder, tiny, monkeypatch):
        # The double's replays hold the pass, and that the cache; a CUDA graph holds its outputs alone.
        outputs = []
        recorder.record = lambda run: outputs.append(run()) or (lambda: outputs[0])
        monkeypatch.setattr(LayerStorage, "enqueue_step", queue_nothing)
        cache = ekv.ElasticCache.for_model(tiny, 4)
        generate(tiny, prompt(1, 100), 5, past_key_values=cache)
        assert recorder.rehearsed == len(outputs) == 1
        gc.collect()
        gc.disable()
        try:
            gone = weakref.ref(cache)
            del cache
            assert gone() is None
        finally:
            gc.enable()

    @pytest.mark.parametrize("how", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))], ids=["copy", "pickle"])
    def test_a_copy_of_the_model_runs_its_own_weights(self, recorder, tiny, how):
        ekv.ElasticCache.for_model(tiny, 4)
        other = how(tiny)
        with torch.no_grad():
            other.lm_head.weight.mul_(-1)
            ids = prompt(1, 5)["input_ids"]
            assert torch.allclose(other(ids).logits, -tiny(ids).logits)
        eager, tokens, cache = both(other, prompt(1, 200))
        assert torch.equal(tokens, eager)
        assert cache.report().captured == 18

    def test_weights_that_move_are_recorded_again(self, recorder, tiny):
        cache = ekv.ElasticCache.for_model(tiny, 4)
        text = generate(tiny, prompt(1, 100), 5, past_key_values=cache)
        tiny.lm_head.weight.data = tiny.lm_head.weight.data.clone()
        generate(tiny, {"input_ids": torch.cat([text, text[:, :3]], dim=1)}, 5, past_key_values=cache)
        assert recorder.recorded == 2
