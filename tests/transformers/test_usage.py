"""How users work with an elastic cache: one line, a block, turns, crops, copies, files, reports."""

import copy
import gc
import json
import warnings
from typing import Any

import pytest
import torch
import transformers as tf

import elastickv.transformers as ekv
from elastickv.errors import NonFiniteError, UsageError
from elastickv.recipe import DENSE, Recipe, read_ratio, stored_ratio
from elastickv.recipe.shape import AttentionShape
from elastickv.transformers.budget import Budget
from elastickv.transformers.cache_argument import CACHE_ARGUMENT, cache_in, without_cache
from elastickv.transformers.cache_report import Ledger
from tests.helpers.model_matrix import CONFIGS, model, padded, prompt


@pytest.fixture(scope="module")
def tiny():
    return model("llama")


@pytest.fixture(autouse=True)
def quiet(tiny):
    tiny.set_attn_implementation("sdpa")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ekv.UncalibratedWarning)
        yield


def generate(tiny, inputs, count=20, **options):
    return tiny.generate(**inputs, max_new_tokens=count, **({"do_sample": False} | options))


def elastic(tiny, compress=1, **options):
    return ekv.ElasticCache.for_model(tiny, compress, **options)


@pytest.mark.parametrize("name", sorted({"past_key_values", CACHE_ARGUMENT}))
def test_a_cache_is_recognized_under_every_name_that_this_release_accepts(tiny, name):
    cache = elastic(tiny, 4)
    arguments = {name: cache, "use_cache": True}
    assert cache_in(arguments) is cache and without_cache(arguments) == {"use_cache": True}
    generate(tiny, prompt(1, 30), **arguments)
    assert cache.lengths == (49,)
    with ekv.elastic(tiny, compress=4) as session:
        generate(tiny, prompt(1, 30), **{name: elastic(tiny, 4)})
    assert session.cache is None


def test_a_call_without_a_cache_has_none():
    assert cache_in({}) is None and cache_in({CACHE_ARGUMENT: None}) is None


class TestBlock:
    def test_every_generate_inside_gets_a_cache_of_its_own_and_the_model_is_restored(self, tiny):
        inputs = padded([70, 41])
        stock = generate(tiny, inputs)
        with ekv.elastic(tiny, compress=1) as session:
            assert session.cache is None
            assert session.report() is None
            assert torch.equal(generate(tiny, inputs), stock)
            first = session.cache
            own = {CACHE_ARGUMENT: elastic(tiny)}
            assert torch.equal(generate(tiny, prompt(1, 30)), generate(tiny, prompt(1, 30), **own))
            assert session.cache is not first
            assert session.report().lengths == (49,)
        assert tiny.config._attn_implementation == "sdpa"
        assert "generate" not in vars(tiny)
        assert torch.equal(generate(tiny, inputs), stock)

    def test_an_exception_inside_restores_the_model(self, tiny):
        class Stop(tf.StoppingCriteria):
            def __call__(self, ids, scores, **kwargs):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), ekv.elastic(tiny, compress=4):
            generate(tiny, prompt(1, 30), stopping_criteria=[Stop()])
        assert tiny.config._attn_implementation == "sdpa"
        assert "generate" not in vars(tiny)

    def test_bad_arguments_leave_the_model_alone(self, tiny):
        with pytest.raises(UsageError, match=r"compress=0\.5 is out of range"), ekv.elastic(tiny, compress=0.5):
            pass
        assert tiny.config._attn_implementation == "sdpa"
        assert "generate" not in vars(tiny)

    def test_calls_that_bring_a_cache_or_want_none_are_left_alone(self, tiny):
        own = tf.DynamicCache(config=tiny.config)
        with ekv.elastic(tiny, compress=4) as session:
            generate(tiny, prompt(1, 30), **{CACHE_ARGUMENT: own})
            generate(tiny, prompt(1, 30), use_cache=False)
            assert session.cache is None
        assert own.get_seq_length() == 49

    def test_blocks_nest(self, tiny):
        with ekv.elastic(tiny, compress=4) as outer:
            with ekv.elastic(tiny, compress=1) as inner:
                generate(tiny, prompt(1, 30))
                assert inner.cache is not None
                assert outer.cache is None
            generate(tiny, prompt(1, 30))
            assert outer.cache is not None
        assert "generate" not in vars(tiny)

    def test_a_model_set_to_eager_stays_eager(self):
        eager = model("llama")
        eager.set_attn_implementation("eager")
        inputs = padded([70, 41])
        stock = generate(eager, inputs)
        with ekv.elastic(eager, compress=1):
            assert eager.config._attn_implementation == "elastickv_eager"
            assert torch.equal(generate(eager, inputs), stock)
        assert eager.config._attn_implementation == "eager"


def test_other_caches_and_none_work_as_before_once_the_attention_is_set(tiny):
    inputs = padded([70, 41])
    stock = generate(tiny, inputs)
    elastic(tiny)
    assert tiny.config._attn_implementation == "elastickv"
    assert torch.equal(generate(tiny, inputs), stock)
    assert torch.equal(generate(tiny, inputs, use_cache=False), stock)
    assert torch.equal(generate(tiny, inputs, cache_implementation="static", disable_compile=True), stock)


def test_tokens_are_streamed(tiny):
    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    streamer = Streamer()
    generated = generate(tiny, prompt(1, 40), past_key_values=elastic(tiny, 4), streamer=streamer)
    assert streamer.tokens == [*generated[0].tolist(), -1]


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 4}, {"assistant": True}])
def test_assisted_decoding_is_the_stock_caches(tiny, options):
    inputs = prompt(1, 40)
    inputs["input_ids"] = inputs["input_ids"][:, :20].repeat(1, 2)
    extra = {"assistant_model": model("llama", seed=4)} if "assistant" in options else options
    stock = generate(tiny, inputs)
    cache = elastic(tiny)
    assert torch.equal(generate(tiny, inputs, past_key_values=cache, **extra), stock)
    assert cache.lengths[0] <= 60
    generate(tiny, inputs, past_key_values=elastic(tiny, recipe="int4,pages=1/4", compress=None), **extra)


class TestRows:
    def test_rows_are_repeated_selected_and_reordered(self, tiny):
        inputs = padded([300, 211])
        for recipe in ("dense", "int4,pages=1/4,anchor_every=2"):
            cache = elastic(tiny, None, recipe=recipe)
            with torch.no_grad():
                tiny(**inputs, past_key_values=cache)
            cache.batch_repeat_interleave(2)
            assert cache.lengths == (300, 300, 211, 211)
            cache.reorder_cache(torch.tensor([2, 1, 0, 0]))
            assert cache.lengths == (211, 300, 300, 300)
            cache.batch_select_indices(torch.tensor([True, False, False, True]))
            assert cache.lengths == (211, 300)
            ids = inputs["input_ids"].flip(0)
            mask = torch.cat([inputs["attention_mask"].flip(0), torch.ones(2, 1, dtype=torch.int64)], 1)
            ids = torch.cat([ids, torch.tensor([[7], [7]])], 1)
            again = elastic(tiny, None, recipe=recipe)
            edited = generate(tiny, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache)
            with torch.no_grad():
                tiny(**{name: tensor.flip(0) for name, tensor in inputs.items()}, past_key_values=again)
            assert torch.equal(edited, generate(tiny, {"input_ids": ids, "attention_mask": mask}, past_key_values=again))

    def test_an_exact_prompt_moves_too(self, tiny):
        inputs = padded([60, 41])
        cache = elastic(tiny, None, recipe="int4", prefill="exact")
        with torch.no_grad():
            tiny(**inputs, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.crop(-5)
        copied = copy.deepcopy(cache)
        cache.reset()
        assert copied.lengths == (55, 55, 36, 36)
        assert cache.lengths == ()

    def test_beams_of_a_compressed_cache_are_its_own_greedy_choice_with_one_beam(self, tiny):
        inputs = padded([300, 211])
        cache = elastic(tiny, None, recipe="int4,pages=1/4")
        wide = generate(tiny, inputs, past_key_values=cache, num_beams=4)
        assert wide.shape[1] == 320
        assert cache.lengths == (319,) * 4 + (230,) * 4


class TestCrop:
    def test_a_crop_and_the_same_tokens_again_change_nothing_without_compression(self, tiny):
        inputs = padded([70, 41])
        cache = elastic(tiny)
        generated = generate(tiny, inputs, past_key_values=cache)
        cache.crop(-15)
        assert cache.get_seq_length() == 74
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 6, dtype=torch.int64)], 1)
        again = generate(tiny, {"input_ids": generated[:, :76], "attention_mask": mask}, 14, past_key_values=cache)
        assert torch.equal(again, generated)

    def test_padding_is_cropped_as_positions(self, tiny):
        cache = elastic(tiny, 4)
        with torch.no_grad():
            tiny(**padded([60, 4]), past_key_values=cache)
        cache.crop(-10)
        assert cache.lengths == (50, 0)
        cache.crop(-50)
        assert cache.get_seq_length() == 0
        assert cache.allocated_bytes == 0

    def test_a_cache_cropped_into_quantized_tokens_continues(self, tiny):
        cache = elastic(tiny, None, recipe="int8")
        inputs = prompt(1, 400)
        with torch.no_grad():
            tiny(**inputs, past_key_values=cache)
            cache.crop(-200)
            logits = tiny(inputs["input_ids"][:, 200:201], past_key_values=cache).logits
            stock = tiny(inputs["input_ids"][:, :201]).logits[:, -1:]
        assert (logits - stock).std() < 0.1 * stock.std()

    @pytest.mark.parametrize("count", [5, -71])
    def test_numbers_that_are_no_crop_are_refused(self, tiny, count):
        cache = elastic(tiny, 4)
        with torch.no_grad():
            tiny(**prompt(1, 70), past_key_values=cache)
        with pytest.raises(UsageError, match="give minus the number"):
            cache.crop(count)
        assert cache.get_seq_length() == 70

    def test_a_stride_cannot_take_back_what_it_dropped(self, tiny):
        cache = elastic(tiny, None, recipe="int8,stride=2")
        with torch.no_grad():
            tiny(**prompt(1, 400), past_key_values=cache)
        with pytest.raises(UsageError, match="has dropped tokens"):
            cache.crop(-200)
        assert cache.get_seq_length() == 400


class TestBudget:
    def test_the_ratio_holds_from_a_context_on_and_everything_is_read_below(self, tiny):
        cache = elastic(tiny, 4)
        report = cache.report()
        assert 500 < report.holds_from < 800
        rows = {row.context: row for row in report.by_context}
        assert rows[512].everything
        assert not rows[1024].everything
        assert all(row.read_ratio >= 4 for row in report.by_context if row.context >= report.holds_from)
        # The selection uses most of its budget: not much less is read than allowed.
        assert all(row.read_ratio < 4.5 for row in report.by_context if not row.everything)

    def test_shares_follow_the_context_and_every_head_reads_by_them(self, tiny):
        cache = elastic(tiny, 4)
        with torch.no_grad():
            tiny(**prompt(1, 600), past_key_values=cache)
            held = cache.elastic_layers[0].store.cache
            for context in (601, 602):
                tiny(prompt(1, 1)["input_ids"], past_key_values=cache)
                assert len(held.pages_read(0, 0)) == (context - 132) // 32
            read = {}
            for more in (150, 400, 900):
                tiny(**{"input_ids": prompt(1, more)["input_ids"]}, past_key_values=cache)
                tiny(prompt(1, 1)["input_ids"], past_key_values=cache)
                pages = (cache.lengths[0] - 132) // 32
                held = cache.elastic_layers[0].store.cache
                read[cache.lengths[0]] = len(held.pages_read(0, 1)) / pages
        assert list(read) == [753, 1154, 2055]
        shares = list(read.values())
        assert shares[0] < shares[1] < shares[2] < 1

    def test_bytes_read_are_those_of_the_steps_as_they_were(self, tiny):
        inputs = padded([900, 800])
        cache = elastic(tiny, 4)
        generate(tiny, inputs, 30, past_key_values=cache)
        report = cache.report()
        assert report.decodes == 29
        assert report.lengths == (929, 829)
        shape = AttentionShape(1, 4, 2, 64)
        recipe = report.recipes[0]
        assert recipe.selection == "pages"
        assert read_ratio(recipe, [929], shape) >= 4
        assert report.read_ratio == pytest.approx(read_ratio(recipe, [915, 815], AttentionShape(2, 4, 2, 64)), rel=0.05)
        assert report.stored_ratio == pytest.approx(stored_ratio(recipe, [929, 829], AttentionShape(2, 4, 2, 64)), rel=1e-9)
        assert 0 < report.quantize_seconds < report.prompt_seconds
        assert "29 decodes read" in str(report)
        assert "everything is read" in str(report)

    def test_a_prompt_through_two_devices_takes_the_seconds_of_both_and_not_those_between(self):
        class Timestamp(float):
            device = "cuda:0"

        class Later(Timestamp):
            device = "cuda:1"

        ledger = Ledger(0)
        for layer, begin, end in (
            (0, Timestamp(1), Timestamp(2)),
            (1, Timestamp(2), Timestamp(4)),
            (2, Later(90), Later(91)),
            (3, Later(91), Later(95)),
        ):
            ledger.begin(layer, begin)
            ledger.end_prompt(end)
        assert ledger.prompt_seconds == 3 + 5

    def test_an_explicit_context_fixes_the_recipe(self, tiny):
        cache = elastic(tiny, 4, context=1000)
        generate(tiny, prompt(1, 1100), 3, past_key_values=cache)
        recipe = cache.recipes[0]
        assert recipe == Recipe.for_ratio(4, 1000, AttentionShape(1, 4, 2, 64))
        assert cache.report().holds_from == 1000

    def test_32k_tokens_are_stored_in_a_third(self):
        shape = AttentionShape(1, 32, 8, 128)
        recipe = Recipe.for_ratio(4, 32768, shape)
        budget = Budget({0: recipe}, shape, "bf16", 4, 32768, False)
        assert stored_ratio(budget.recipes[0], [32768], shape) >= 3.1

    def test_memory_is_what_the_codes_need_and_is_freed(self):
        config = tf.LlamaConfig(**CONFIGS["llama"]().to_dict() | {"max_position_embeddings": 40000, "num_hidden_layers": 1})
        tiny = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        cache = elastic(tiny, 4)
        layer = cache.elastic_layers[0]
        keys = torch.randn(1, 2, 32768, 64)
        from elastickv.transformers.layer_storage import Backends, new_store

        budget = cache._config.settle(32768, "bf16")
        layer.store = new_store(Backends(), AttentionShape(1, 4, 2, 64), 32832, "bf16", budget.recipes[0], 64, keys.device)
        import numpy as np

        layer.store.extend(keys, keys, np.array([32768]))
        dense = 32768 * 2 * 64 * 2 * 2
        assert dense / layer.store.cache.allocated_bytes > 3.0
        cache.reset()
        gc.collect()
        assert cache.allocated_bytes == 0

    def test_a_warning_tells_the_loss_and_the_command(self, tiny):
        with pytest.warns(
            ekv.UncalibratedWarning, match="expected loss 0.[0-9]+.*elastickv calibrate .* --text FILE"
        ) as caught:
            elastic(tiny, 4)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            elastic(tiny, 1)
            elastic(tiny, None, recipe="int4")

    def test_a_model_of_windows_alone_is_served_and_says_that_nothing_is_compressed(self):
        windowed = model("mistral-windowed")
        with pytest.warns(UserWarning, match="nothing is compressed"):
            cache = elastic(windowed, 4)
        assert torch.equal(generate(windowed, prompt(1, 70), past_key_values=cache), generate(windowed, prompt(1, 70)))
        report = cache.report()
        assert report.stock_bytes > 0
        assert report.stored_bytes == 0


class TestRecipes:
    def test_all_ways_to_name_recipes(self, tiny, tmp_path):
        file, text = tmp_path / "recipes.json", tmp_path / "recipe.txt"
        file.write_text(json.dumps({"format": "elastickv-recipes", "version": 1, "recipe": "int8", "layers": {"1": "int4"}}))
        text.write_text("int4,pages=1/4\n")
        int8, int4 = Recipe.parse("int8"), Recipe.parse("int4")
        ways: list[tuple[dict[str, Any], list[Recipe]]] = [
            ({"recipe": int8}, [int8, int8]),
            ({"recipe": "int8", "layers": {1: int4}}, [int8, int4]),
            ({"recipe": ["int8", int4]}, [int8, int4]),
            ({"recipe": {0: "int8", 1: "int4"}}, [int8, int4]),
            ({"compress": 1, "layers": {0: "int8"}}, [int8, DENSE]),
            ({"recipe": file}, [int8, int4]),
            ({"recipe": str(text)}, [Recipe.parse("int4,pages=1/4")] * 2),
        ]
        for options, expected in ways:
            cache = ekv.ElasticCache.for_model(tiny, **options)
            generate(tiny, prompt(1, 50), 2, past_key_values=cache)
            assert list(cache.recipes.values()) == expected

    def test_a_text_may_leave_a_number_to_the_ratio(self, tiny):
        cache = elastic(tiny, 4, recipe="int4,pages", context=1024)
        generate(tiny, prompt(1, 1024), 2, past_key_values=cache)
        recipe = cache.recipes[0]
        assert read_ratio(recipe, [1024], AttentionShape(1, 4, 2, 64)) >= 4

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "neither compress nor a recipe"),
            ({"compress": 0.9}, "compress=0.9 is out of range"),
            ({"compress": "four"}, "compress='four' is not a number"),
            ({"compress": float("nan")}, "out of range"),
            ({"compress": 4, "recipe": "int8"}, "both given"),
            ({"recipe": "int9"}, "'int9' is not a term"),
            ({"recipe": "int4,pages"}, "leaves a number open"),
            ({"recipe": "no/such.json"}, "does not exist"),
            ({"recipe": ["int8"]}, "1 recipes for 2 layers"),
            ({"recipe": {7: "int8"}, "compress": 4}, "layer 7 has no full attention"),
            ({"compress": 4, "layers": {0: 3}}, "3 is not a recipe"),
            ({"compress": 4, "context": 0}, "context=0 is out of range"),
            ({"compress": 4, "capacity": 2.5}, "capacity=2.5 is out of range"),
            ({"compress": 4, "context": 900, "capacity": 800}, "no row can reach it"),
            ({"compress": 4, "prefill": "fast"}, "prefill='fast' is unknown"),
            ({"compress": 4, "calibration": "nowhere.json"}, "nowhere.json"),
            ({"recipe": "int4,pages=1/2:1/4:1/8"}, "3 fractions for 2 KV heads"),
        ],
    )
    def test_contradictory_arguments_are_refused(self, tiny, options, message):
        with pytest.raises(UsageError, match=message):
            ekv.ElasticCache.for_model(tiny, **options)
        assert tiny.config._attn_implementation == "sdpa"


class TestFiles:
    def test_a_compressed_cache_continues_from_a_file(self, tiny, tmp_path):
        inputs = padded([900, 400])
        cache = elastic(tiny, 4)
        generated = generate(tiny, inputs, 5, past_key_values=cache)
        cache.save(tmp_path / "c")
        loaded = ekv.ElasticCache.load(str(tmp_path / "c"), tiny)
        assert loaded.recipes == cache.recipes
        assert loaded.lengths == cache.lengths
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 5, dtype=torch.int64)], 1)
        rest = {"input_ids": generated, "attention_mask": mask}
        assert torch.equal(generate(tiny, rest, past_key_values=loaded), generate(tiny, rest, past_key_values=cache))

    def test_a_prompt_that_is_still_exact_is_saved_too(self, tiny, tmp_path):
        cache = elastic(tiny, 4, prefill="exact")
        with torch.no_grad():
            tiny(**prompt(1, 60), past_key_values=cache)
        cache.save(tmp_path / "c")
        assert torch.equal(
            ekv.ElasticCache.load(tmp_path / "c", tiny).elastic_layers[1].held[0], cache.elastic_layers[1].held[0]
        )

    def test_files_that_are_no_cache_of_this_model_are_refused(self, tiny, tmp_path):
        cache = elastic(tiny, 4)
        cache.save(tmp_path / "c")
        with pytest.raises(UsageError, match="another model"):
            ekv.ElasticCache.load(tmp_path / "c", model("llama", seed=3))
        with pytest.raises(UsageError, match="no saved cache"):
            ekv.ElasticCache.load(tmp_path / "none", tiny)
        (tmp_path / "junk").write_bytes(b"\0" * 64)
        with pytest.raises(UsageError, match="no saved cache"):
            ekv.ElasticCache.load(tmp_path / "junk", tiny)
        with pytest.raises(UsageError, match="cannot be written"):
            cache.save(tmp_path / "no" / "such" / "folder")


def test_a_value_that_is_not_finite_is_reported_with_its_position():
    broken = model("llama")
    with torch.no_grad():
        broken.model.layers[1].self_attn.k_proj.weight[70] = torch.nan
    with pytest.raises(NonFiniteError, match=r"layer 1: .*sequence 0, KV head 1, position 0"):
        generate(broken, prompt(1, 40), past_key_values=elastic(broken, 4))


def test_layers_have_their_anchors_apart(tiny, tmp_path):
    cache = elastic(tiny, None, recipe="int4,pages=1/4,anchor_every=4")
    generate(tiny, prompt(1, 500), 30, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.save(tmp_path / "c")
    for one in (cache, copy.deepcopy(cache), ekv.ElasticCache.load(tmp_path / "c", tiny)):
        assert [layer.store.cache.anchor_offset for layer in one.elastic_layers] == [0, 2]
