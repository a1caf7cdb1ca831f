"""Heads split over two processes, each of which loads the plug-in and has caches of its own."""

import pytest

from tests.helpers.bad_words import LARGE, NAN, with_bad_word, with_bad_words
from tests.helpers.parallel_engine import EngineResult, ask
from tests.helpers.read_rule import follows
from tests.helpers.served_calibration import SHARES, write_calibration
from tests.helpers.served_llama import Sizes, write_model
from tests.helpers.serving_engine import DEFAULTS, ServingEngine
from tests.helpers.serving_scenarios import LENGTHS, RECIPE, WINDOW, all_equal, all_follow, random_prompts


@pytest.fixture
def ask_one_and_two(serve, folder):
    """Return a function that asks an engine in this process, and one in processes of its own with two of the model."""

    def asked(plug_in, prompts, tokens):
        serve.close()
        engine = ServingEngine(folder, plug_in)
        try:
            before = engine.reads()
            answers = engine.generate(prompts, tokens)
            counters = {name: value - before.get(name, 0) for name, value in engine.reads().items()}
            one = EngineResult([answers], counters, engine.scheduler.kv_cache_config.num_blocks)
        finally:
            engine.close()
        options = {"model": str(folder), "tensor_parallel_size": 2, "additional_config": {"elastickv": plug_in}}
        return one, ask(prompts, tokens, **DEFAULTS, **options)

    return asked


def alike(one, two):
    """Return the counters of an engine, having checked that another has read as much; steps depend on when requests arrive."""
    first, second = ({n: v for n, v in asked.counters.items() if n != "decode_steps"} for asked in (one, two))
    assert first == second
    return first


def test_two_ranks_answer_as_one_engine_does(serve, folder, rule):
    prompts, engine = random_prompts(LENGTHS), serve()
    before = engine.reads()
    alone = engine.generate(prompts, 24)
    plug_in = {"elastickv": {"format": RECIPE, "window": WINDOW}}
    options = DEFAULTS | {"model": str(folder), "tensor_parallel_size": 2, "additional_config": plug_in}
    asked = ask(prompts, 24, **options)
    (answers,), reads = asked.answers, asked.counters
    all_follow(rule(), answers)
    all_equal(rule(), answers, alone)
    one = {name: value - before[name] for name, value in engine.reads().items()}
    assert reads["kv_read_bytes"] == one["kv_read_bytes"] > 0 and reads["kv_dense_bytes"] == one["kv_dense_bytes"]
    # Each rank has as much memory as the engine alone, and half of the heads.
    assert asked.blocks == pytest.approx(2 * engine.scheduler.kv_cache_config.num_blocks, rel=0.03)


def test_each_rank_reads_the_shares_of_its_own_heads(ask_one_and_two, folder, rule, tmp_path):
    """A head reads an eighth of its pages and the other a half, in the second layer the other way round."""
    calibration = write_calibration(tmp_path / "calibration.json", folder)
    one, two = ask_one_and_two(calibration | {"compress": 5, "window": WINDOW}, random_prompts((400, 37, 250)), 40)
    layers, swapped = ({0: f"int4,pages={a}:{b}", 1: f"int4,pages={b}:{a}"} for a, b in (("1/8", "1/2"), ("1/2", "1/8")))
    all_follow(rule(layers=layers), two.answers[0])
    assert any(follows(rule(layers=swapped), answer) for answer in two.answers[0]), "these shares cannot be told apart"
    all_equal(rule(layers=layers), two.answers[0], one.answers[0])
    assert alike(one, two)["anchors"] > 0


def test_each_rank_smooths_the_keys_of_its_own_heads(ask_one_and_two, folder, tmp_path):
    """A calibration by which all layers have rotated keys; the factors of the two KV heads differ."""
    sizes, same = Sizes(), (0.1,) * len(SHARES)
    head = [tuple((channel * factor) % 5 - 2 for channel in range(sizes.head_dim)) for factor in range(3, 3 + sizes.kv_heads)]
    calibration = write_calibration(tmp_path / "calibration.json", folder, same, same, (tuple(head), tuple(head[::-1])))
    one, two = ask_one_and_two(calibration | {"compress": 2, "window": WINDOW}, random_prompts(LENGTHS), 24)
    assert [answer.tokens for answer in one.answers[0]] == [answer.tokens for answer in two.answers[0]]
    assert alike(one, two)["kv_read_bytes"] > 0


def test_a_request_with_nan_fails_though_other_processes_run_the_model(serve, weights, tmp_path):
    """Each rank finds it in heads of its own; the process that schedules sees logits only."""
    serve.close()
    folder = write_model(tmp_path / "llama", with_bad_words(weights))
    prompts = [with_bad_word(NAN), *random_prompts(LENGTHS[:2])]
    plug_in = {"elastickv": {"format": RECIPE, "window": WINDOW}}
    (answers,) = ask(prompts, 12, **DEFAULTS, model=str(folder), tensor_parallel_size=2, additional_config=plug_in).answers
    assert [len(answer.tokens) for answer in answers] == [0, 12, 12]


def test_a_server_whose_scheduler_runs_the_model_fails_requests_by_their_tokens(serve, weights, tmp_path):
    """As on one GPU: an engine in a process of its own, without a process for the model, and without counts of NaN."""
    serve.close()
    folder = write_model(tmp_path / "llama", with_bad_words(weights))
    prompts = [with_bad_word(NAN), random_prompts(LENGTHS[:1])[0], with_bad_word(LARGE)]
    plug_in = {"elastickv": {"format": RECIPE, "window": WINDOW}}
    one_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_COMPUTE_NANS_IN_LOGITS": "0"}
    (answers,) = ask(prompts, 12, one_process, **DEFAULTS, model=str(folder), additional_config=plug_in).answers
    assert [len(answer.tokens) for answer in answers] == [0, 12, 0]
