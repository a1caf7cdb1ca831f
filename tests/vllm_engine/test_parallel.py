"""Heads split over two processes, each of which loads the plug-in and has caches of its own."""

from elastickv.recipe import ModelCalibration
from tests.helpers.bad_words import LARGE, NAN, with_bad_word, with_bad_words
from tests.helpers.parallel_engine import ask, ask_and_count
from tests.helpers.served_llama import Sizes, write_model
from tests.helpers.serving_engine import DEFAULTS
from tests.helpers.serving_scenarios import LENGTHS, RECIPE, WINDOW, all_equal, all_follow, random_prompts


def test_two_ranks_answer_as_one_engine_does(serve, folder, rule):
    prompts, engine = random_prompts(LENGTHS), serve()
    before = engine.reads()
    alone = engine.generate(prompts, 24)
    plug_in = {"elastickv": {"format": RECIPE, "window": WINDOW}}
    options = DEFAULTS | {"model": str(folder), "tensor_parallel_size": 2, "additional_config": plug_in}
    (answers,), reads = ask_and_count(prompts, 24, **options)
    all_follow(rule(), answers)
    all_equal(rule(), answers, alone)
    one = {name: value - before[name] for name, value in engine.reads().items()}
    assert reads["kv_read_bytes"] == one["kv_read_bytes"] > 0 and reads["kv_dense_bytes"] == one["kv_dense_bytes"]


def test_each_rank_smooths_the_keys_of_its_own_heads(serve, folder, tmp_path):
    """A calibration by which all layers have rotated keys; the factors of the two KV heads differ."""
    from transformers import AutoConfig

    from elastickv.vllm.checkpoint_fingerprint import checkpoint_fingerprint

    sizes = Sizes()
    errors = tuple((0.1,) * sizes.kv_heads for _ in range(sizes.layers))
    head = [tuple((channel * factor) % 5 - 2 for channel in range(sizes.head_dim)) for factor in range(3, 3 + sizes.kv_heads)]
    calibration = ModelCalibration(
        model="random", fingerprint=checkpoint_fingerprint(folder, AutoConfig.from_pretrained(folder)),
        layers=tuple(range(sizes.layers)), query_heads=sizes.heads, kv_heads=sizes.kv_heads, head_dim=sizes.head_dim,
        text="none", tokens=1, queries=1, pages={1: {1.0: errors, 0.5: errors}},
        keys={"int4": errors, "int4+rotated": tuple((0.01,) * sizes.kv_heads for _ in errors)}, values={"int4/64": errors},
        smoothing=(tuple(head), tuple(head[::-1])),
    )  # fmt: skip
    file = tmp_path / "calibration.json"
    file.write_text(calibration.dumps(), encoding="utf-8")
    plug_in = {"elastickv": {"calibration": str(file), "compress": 2, "window": WINDOW}}
    prompts = random_prompts(LENGTHS)
    serve.close()
    (one, of_one), (two, of_two) = (
        ask_and_count(prompts, 24, **DEFAULTS, model=str(folder), tensor_parallel_size=ranks, additional_config=plug_in)
        for ranks in (1, 2)
    )
    assert [answer.tokens for answer in one[0]] == [answer.tokens for answer in two[0]]
    assert of_one["kv_read_bytes"] == of_two["kv_read_bytes"] > 0 and of_one["anchors"] == of_two["anchors"]


def test_a_request_with_nan_fails_though_other_processes_run_the_model(serve, weights, tmp_path):
    """Each rank finds it in heads of its own; the process that schedules sees logits only."""
    serve.close()
    folder = write_model(tmp_path / "llama", with_bad_words(weights))
    prompts = [with_bad_word(NAN), *random_prompts(LENGTHS[:2])]
    plug_in = {"elastickv": {"format": RECIPE, "window": WINDOW}}
    (answers,) = ask(prompts, 12, **DEFAULTS, model=str(folder), tensor_parallel_size=2, additional_config=plug_in)
    assert [len(answer.tokens) for answer in answers] == [0, 12, 12]


def test_a_server_whose_scheduler_runs_the_model_fails_requests_by_their_tokens(serve, weights, tmp_path):
    """As on one GPU: an engine in a process of its own, without a process for the model, and without counts of NaN."""
    serve.close()
    folder = write_model(tmp_path / "llama", with_bad_words(weights))
    prompts = [with_bad_word(NAN), random_prompts(LENGTHS[:1])[0], with_bad_word(LARGE)]
    plug_in = {"elastickv": {"format": RECIPE, "window": WINDOW}}
    one_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_COMPUTE_NANS_IN_LOGITS": "0"}
    (answers,) = ask(prompts, 12, one_process, **DEFAULTS, model=str(folder), additional_config=plug_in)
    assert [len(answer.tokens) for answer in answers] == [0, 12, 0]
