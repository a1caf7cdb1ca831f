"""What only a GPU runs: the second model runner, asynchronous scheduling, compiled models, full CUDA graphs.

Engines compute in bfloat16, so their answers are near the plain model's: nearest to the one with their own window.
`python -m pytest tests/vllm_engine -m gpu`
"""

import numpy as np
import pytest

from tests.helpers.rounded_answers import agree, distance, follow
from tests.helpers.serving_scenarios import CHUNKED, NEW_TOKENS, NGRAM, SMALL_POOL, random_prompts

pytestmark = pytest.mark.gpu


def test_the_engine_is_what_a_user_of_a_gpu_gets(serve_bf16, device):
    from vllm import __version__
    from vllm.config import CUDAGraphMode

    config = serve_bf16(**CHUNKED).engine.vllm_config
    if device == "cuda":
        assert config.compilation_config.cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        assert config.scheduler_config.async_scheduling
        if not __version__.startswith("0.32"):
            assert serve_bf16(**CHUNKED).runner_module.startswith("vllm.v1.worker.gpu.")


def test_chunks_and_graphs_follow_the_rule(graphed, rounded_rule):
    follow(rounded_rule, graphed)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_batches_of_any_size_follow_the_rule(serve_bf16, rounded_rule, count):
    """Sizes with a graph of their own and sizes that are padded to the next."""
    follow(rounded_rule, serve_bf16(**CHUNKED).generate(random_prompts([150 + 31 * i for i in range(count)], count), 90))


def test_answers_to_a_cached_prompt_follow_the_rule(serve_bf16, rounded_rule):
    engine, prompts = serve_bf16(**CHUNKED), random_prompts([300, 260], seed=60)
    engine.generate(prompts, 40)
    again = engine.generate(prompts, 90)
    assert [answer.cached for answer in again] == [288, 256]
    follow(rounded_rule, again)


def test_a_hit_without_its_window_reads_pages(serve_bf16, rounded_rule):
    engine, prompts = serve_bf16(**CHUNKED), random_prompts([300, 290, 310, 333], seed=61)
    engine.generate(prompts, 10)
    engine.evict_windows()
    answers = engine.generate(prompts, 60)
    assert [answer.cached for answer in answers] == [288, 288, 288, 320]
    assert all(answer.window_first[answer.cached] == answer.cached for answer in answers)
    follow(rounded_rule, answers)
    assert distance(rounded_rule(), answers) < distance(rounded_rule(), answers, window_first=False)


def test_several_answers_to_one_prompt_follow_the_rule(serve_bf16, rounded_rule, prompts):
    engine = serve_bf16(**CHUNKED)
    # At a low temperature, so that likely tokens are compared.
    name, ended = engine.add(prompts[2], 100, n=4, temperature=0.3), {}
    while name not in ended:
        ended |= engine.step()
    follow(rounded_rule, engine.answers(ended[name], prompts[2]))


def test_answers_that_hit_the_prompt_in_the_step_that_computes_it_follow_the_rule(serve_bf16, rounded_rule):
    """All but one of the requests compute one token, and read what the same step stores."""
    engine, prompts, answers = serve_bf16(**CHUNKED), random_prompts([65] * 8, seed=62), []  # two pages and a token
    for prompt in prompts:
        together = engine.generate([prompt] * 4, 60)
        assert sorted(answer.cached for answer in together) == [0, 64, 64, 64]
        firsts = [answer.logprobs[0] for answer in together if answer.tokens[0] == together[0].tokens[0]]
        assert len(firsts) == 4 and max(firsts) - min(firsts) < 0.2, firsts
        answers += together
    follow(rounded_rule, answers)


def test_aborted_requests_leave_no_block_behind(serve_bf16, rounded_rule, prompts, graphed):
    engine = serve_bf16(**CHUNKED)
    start, rng, running = engine.free_blocks, np.random.default_rng(0), []
    for step in range(150):
        if rng.random() < 0.4:
            running.append(engine.add(random_prompts([int(rng.integers(1, 300))], step)[0], int(rng.integers(1, 100))))
        if running and rng.random() < 0.3:
            engine.engine.abort_request([running.pop(int(rng.integers(len(running))))])
        ended = engine.step()
        running = [name for name in running if name not in ended]
    engine.engine.abort_request(running)
    while engine.engine.has_unfinished_requests():
        engine.step()
    engine.settle()
    assert engine.free_blocks == start
    engine.forget_prefixes()
    agree(rounded_rule, engine.generate(prompts, NEW_TOKENS), graphed)


def test_whole_prompts_without_graphs_and_with_preemption_give_the_same_answers(serve_bf16, rounded_rule, prompts, graphed):
    # A window in 16 bit takes half the blocks of one in float32.
    pool = SMALL_POOL | {"num_gpu_blocks_override": 64}
    answers = serve_bf16(enforce_eager=True, **pool).generate(prompts, NEW_TOKENS)
    preemptions = [answer.preemptions for answer in answers]
    print(f"measured: {preemptions} preemptions")
    assert sum(preemptions) > 0
    follow(rounded_rule, answers)
    agree(rounded_rule, answers, graphed)


def test_drafts_by_ngrams_give_the_same_answers(serve_bf16, rounded_rule, prompts, graphed):
    engine = serve_bf16(speculative_config=NGRAM, max_num_batched_tokens=96)
    answers = engine.generate(prompts, NEW_TOKENS)
    follow(rounded_rule, answers)
    agree(rounded_rule, answers, graphed)


def test_drafts_that_are_accepted_follow_the_rule(serve_bf16, rounded_rule, prompts):
    """Answers of a few words repeat themselves: many drafts are right, and many are not."""
    engine = serve_bf16(speculative_config=NGRAM, max_num_batched_tokens=96)
    before = drafts(engine)
    answers = engine.generate(prompts, NEW_TOKENS, allowed_token_ids=[3, 5, 8])
    drafted, accepted = (after - start for after, start in zip(drafts(engine), before, strict=True))
    print(f"measured: {accepted} of {drafted} drafts accepted")
    assert drafted > accepted > NEW_TOKENS // 4
    follow(rounded_rule, answers)


def drafts(engine):
    return [engine.counter(f"vllm:spec_decode_num_{name}_tokens") for name in ("draft", "accepted")]


def test_int8_pages_follow_their_rule(serve_bf16, rounded_rule, prompts):
    follow(rounded_rule, serve_bf16("int8").generate(prompts, NEW_TOKENS), "int8")
