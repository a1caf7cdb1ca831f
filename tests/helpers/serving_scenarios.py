"""What the tests of the serving backend ask engines, and how answers are checked."""

import numpy as np

from tests.helpers.read_rule import disagreement, follows

RECIPE, WINDOW = "int4", 64
LENGTHS = (100, 37, 211, 64, 5)
# Memory of an engine on a GPU. Those that a process has closed may keep theirs, and a file starts a dozen. The cache's size is
# given, because vLLM would count what other processes allocate while an engine starts.
GPU_MEMORY = {"gpu_memory_utilization": 0.07, "kv_cache_memory_bytes": 2 << 30}
NEW_TOKENS = 104
# Less than the requests need together: some are preempted.
SMALL_POOL = {"num_gpu_blocks_override": 100, "max_model_len": 512}

CHUNKED = {"max_num_batched_tokens": 96, "enable_prefix_caching": True}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
ADAPTER_RANK = 8
ADAPTERS = {"enable_lora": True, "max_lora_rank": ADAPTER_RANK, "max_loras": 1}


def random_prompts(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 500, length).tolist() for length in lengths]


def all_follow(model, answers, **options):
    reasons = [follows(model, answer, **options) for answer in answers]
    assert not any(reasons), reasons


def all_equal(model, answers, others):
    reasons = [disagreement(model, answer, other) for answer, other in zip(answers, others, strict=True)]
    assert not any(reasons), reasons
