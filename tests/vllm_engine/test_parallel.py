"""Heads split over two processes, each of which loads the plug-in and has caches of its own."""

from tests.helpers.parallel_engine import ask
from tests.helpers.serving_engine import DEFAULTS
from tests.helpers.serving_scenarios import LENGTHS, RECIPE, WINDOW, all_equal, all_follow, random_prompts


def test_two_ranks_answer_as_one_engine_does(serve, folder, rule):
    prompts = random_prompts(LENGTHS)
    alone = serve().generate(prompts, 24)
    plug_in = {"elastickv": {"format": RECIPE, "window": WINDOW}}
    (answers,) = ask(prompts, 24, **DEFAULTS, model=str(folder), tensor_parallel_size=2, additional_config=plug_in)
    all_follow(rule(), answers)
    all_equal(rule(), answers, alone)
