"""What the tests of the serving backend ask engines, and how answers are checked."""

import numpy as np

from tests.helpers.read_rule import disagreement, follows

RECIPE, WINDOW = "int4", 64
LENGTHS = (100, 37, 211, 64, 5)
NEW_TOKENS = 130
# Less than the requests need together: some are preempted.
SMALL_POOL = {"num_gpu_blocks_override": 100, "max_model_len": 512}


def random_prompts(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 500, length).tolist() for length in lengths]


def all_follow(model, answers, **options):
    for answer in answers:
        assert follows(model, answer, **options) is None


def all_equal(model, answers, others):
    for answer, other in zip(answers, others, strict=True):
        assert disagreement(model, answer, other) is None
