"""Heads split over two processes, each of which loads the plug-in and has caches of its own."""

from tests.helpers.bad_words import NAN, with_bad_word, with_bad_words
from tests.helpers.parallel_engine import ask
from tests.helpers.served_llama import write_model
from tests.helpers.serving_engine import DEFAULTS
from tests.helpers.serving_scenarios import LENGTHS, RECIPE, WINDOW, all_equal, all_follow, random_prompts


def test_two_ranks_answer_as_one_engine_does(serve, folder, rule):
    prompts = random_prompts(LENGTHS)
    alone = serve().generate(prompts, 24)
    plug_in = {"elastickv": {"format": RECIPE, "window": WINDOW}}
    (answers,) = ask(prompts, 24, **DEFAULTS, model=str(folder), tensor_parallel_size=2, additional_config=plug_in)
    all_follow(rule(), answers)
    all_equal(rule(), answers, alone)


def test_a_request_with_nan_fails_though_other_processes_run_the_model(serve, weights, tmp_path):
    """Each rank finds it in heads of its own; the process that schedules sees logits only."""
    serve.close()
    folder = write_model(tmp_path / "llama", with_bad_words(weights))
    prompts = [with_bad_word(NAN), *random_prompts(LENGTHS[:2])]
    plug_in = {"elastickv": {"format": RECIPE, "window": WINDOW}}
    (answers,) = ask(prompts, 12, **DEFAULTS, model=str(folder), tensor_parallel_size=2, additional_config=plug_in)
    assert [len(answer.tokens) for answer in answers] == [0, 12, 12]
