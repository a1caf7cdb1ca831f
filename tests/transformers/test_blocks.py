"""Blocks of one model overlap, nest and run in threads; after the last one the model is as it was."""

import copy
import gc
import pickle
import threading
from contextlib import ExitStack

import pytest
import torch
from transformers import StoppingCriteria

import elastickv.transformers as ekv
from elastickv.errors import UsageError
from elastickv.transformers.cache_argument import CACHE_ARGUMENT
from tests.helpers.model_matrix import model, padded

FIRST, SECOND = "int4,pages=1/4", "int8"
INPUTS = padded([220, 190])


def generate(tiny, **options):
    return tiny.generate(**INPUTS, do_sample=False, pad_token_id=0, max_new_tokens=7, **options)


@pytest.fixture(scope="module")
def tiny():
    return model("llama")


@pytest.fixture(scope="module")
def texts(tiny):
    """The text of each recipe in a block alone, and the stock one's."""
    made = {None: generate(tiny)}
    for recipe in (FIRST, SECOND):
        with ekv.elastic(tiny, recipe=recipe):
            made[recipe] = generate(tiny)
    assert not torch.equal(made[None], made[FIRST]) and not torch.equal(made[FIRST], made[SECOND])
    return made


@pytest.fixture(autouse=True)
def model_is_as_before(tiny):
    attributes, implementation = dict(vars(tiny)), tiny.config._attn_implementation
    yield
    assert tiny.config._attn_implementation == implementation == "sdpa"
    assert set(vars(tiny)) == set(attributes)
    assert all(vars(tiny)[name] is value for name, value in attributes.items())


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_blocks_end_in_any_order_and_the_open_one_continues_to_work(tiny, texts, first_ends_first):
    blocks = {recipe: ekv.elastic(tiny, recipe=recipe) for recipe in (FIRST, SECOND)}
    sessions = {recipe: block.__enter__() for recipe, block in blocks.items()}
    assert torch.equal(generate(tiny), texts[SECOND])
    ended, other = (FIRST, SECOND) if first_ends_first else (SECOND, FIRST)
    blocks[ended].__exit__(None, None, None)
    used = sessions[other].cache
    assert torch.equal(generate(tiny), texts[other])
    assert sessions[other].cache is not used
    blocks[other].__exit__(None, None, None)
    assert torch.equal(generate(tiny), texts[None])


def test_an_eager_model_is_eager_again_after_overlapping_blocks():
    eager = model("llama")
    eager.set_attn_implementation("eager")
    first, second = ekv.elastic(eager, recipe=FIRST), ekv.elastic(eager, recipe=SECOND)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert eager.config._attn_implementation == "elastickv_eager"
    second.__exit__(None, None, None)
    assert eager.config._attn_implementation == "eager" and "generate" not in vars(eager)


def test_each_thread_uses_its_own_block(tiny, texts):
    both, generated, errors = threading.Barrier(2, timeout=60), {}, []

    def work(recipe, stays):
        try:
            with ekv.elastic(tiny, recipe=recipe):
                both.wait()
                generated[recipe] = generate(tiny)
                both.wait()
                if stays:
                    both.wait()  # the other block has ended
                    generated["later"] = generate(tiny)
            if not stays:
                both.wait()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=arguments) for arguments in ((FIRST, True), (SECOND, False))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(torch.equal(generated[recipe], texts[recipe]) for recipe in (FIRST, SECOND))
    assert torch.equal(generated["later"], texts[FIRST])


def test_a_generate_that_is_running_when_its_block_ends_is_finished_first(tiny, texts):
    began, ended, generated = threading.Event(), threading.Event(), []

    class Wait(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            began.set()
            ended.wait(60)
            return torch.zeros(len(ids), dtype=torch.bool)

    thread = threading.Thread(target=lambda: generated.append(generate(tiny, stopping_criteria=[Wait()])))
    with ekv.elastic(tiny, recipe=FIRST):
        thread.start()
        assert began.wait(60)
    assert "generate" not in vars(tiny)
    ended.set()
    thread.join()
    assert torch.equal(generated[0], texts[FIRST])


def test_generators_hold_blocks_open(tiny, texts):
    def forever(recipe):
        with ekv.elastic(tiny, recipe=recipe):
            while True:
                yield generate(tiny)

    first, second = forever(FIRST), forever(SECOND)
    assert torch.equal(next(first), texts[FIRST]) and torch.equal(next(second), texts[SECOND])
    first.close()
    assert torch.equal(next(second), texts[SECOND])
    del second
    gc.collect()


def test_exceptions_end_overlapping_blocks(tiny):
    stacks = [ExitStack(), ExitStack()]
    for stack, recipe in zip(stacks, (FIRST, SECOND), strict=True):
        stack.enter_context(ekv.elastic(tiny, recipe=recipe))
    for stack in stacks:
        with pytest.raises(KeyboardInterrupt), stack:
            raise KeyboardInterrupt


def test_a_block_that_cannot_be_opened_leaves_an_open_one_alone(tiny, texts):
    with ekv.elastic(tiny, recipe=FIRST):
        with pytest.raises(UsageError, match="out of range"), ekv.elastic(tiny, compress=0.5):
            pass
        assert torch.equal(generate(tiny), texts[FIRST])


def test_what_for_model_sets_outlasts_a_block_until_it_is_released(tiny, texts):
    cache = ekv.ElasticCache.for_model(tiny, recipe=SECOND)
    with ekv.elastic(tiny, recipe=FIRST):
        pass
    assert torch.equal(generate(tiny, **{CACHE_ARGUMENT: cache}), texts[SECOND])
    with ekv.elastic(tiny, recipe=FIRST):
        ekv.release(tiny)
        assert torch.equal(generate(tiny), texts[FIRST])


def test_a_cache_that_another_thread_makes_meanwhile_outlasts_the_block(tiny, texts):
    made = []
    with ekv.elastic(tiny, recipe=FIRST):
        thread = threading.Thread(target=lambda: made.append(ekv.ElasticCache.for_model(tiny, recipe=SECOND)))
        thread.start()
        thread.join()
    assert torch.equal(generate(tiny, **{CACHE_ARGUMENT: made[0]}), texts[SECOND])
    ekv.release(tiny)


def test_a_thread_without_a_block_uses_the_open_one(tiny, texts):
    generated = []
    with ekv.elastic(tiny, recipe=FIRST):
        thread = threading.Thread(target=lambda: generated.append(generate(tiny)))
        thread.start()
        thread.join()
    assert torch.equal(generated[0], texts[FIRST])


def test_a_generate_that_the_user_sets_inside_stays_the_users(tiny, texts):
    with ekv.elastic(tiny, recipe=FIRST):
        inner = tiny.generate
        tiny.generate = lambda **options: inner(**options)
        with ekv.elastic(tiny, recipe=SECOND):
            assert torch.equal(generate(tiny), texts[SECOND])
        assert torch.equal(generate(tiny), texts[FIRST])
    assert torch.equal(generate(tiny), texts[None])
    del tiny.generate


def test_copies_made_inside_have_a_plain_generate(tiny, texts):
    with ekv.elastic(tiny, recipe=FIRST):
        copies = copy.deepcopy(tiny), pickle.loads(pickle.dumps(tiny))
        assert all(torch.equal(generate(one), texts[None]) for one in copies)
        assert torch.equal(generate(tiny), texts[FIRST])


def test_a_model_that_cannot_generate_is_refused(tiny):
    with pytest.raises(UsageError, match="LlamaModel has no generate"), ekv.elastic(tiny.model, compress=1):
        pass
