"""What the schedulers make of NaN in logits, told by outputs that are made up: vLLM on CPUs does not schedule ahead."""

from types import SimpleNamespace

import pytest

from elastickv.backends.bad_token import BadToken
from elastickv.vllm import bad_tokens
from elastickv.vllm.bad_tokens import BadTokens
from tests.helpers.serving_scenarios import random_prompts


@pytest.fixture
def ahead(serve):
    """Yield an asynchronous scheduler of an engine's caches, without an engine."""
    from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes

    from elastickv.vllm.fail_on_nan_scheduler import FailOnNanAsyncScheduler

    core = serve(enable_prefix_caching=True).core
    caches = core.scheduler.kv_cache_config
    block_size, hash_block_size = resolve_kv_cache_block_sizes(caches, core.vllm_config)
    made = FailOnNanAsyncScheduler(
        vllm_config=core.vllm_config,
        kv_cache_config=caches,
        structured_output_manager=core.structured_output_manager,
        block_size=block_size,
        hash_block_size=hash_block_size,
    )
    layers = core.vllm_config.compilation_config.static_forward_context
    of_the_engine = bad_tokens._of_layers[id(layers)]
    tokens = BadTokens("cpu", 8, layers)
    tokens.of_layer("first")
    pool = made.kv_cache_manager.block_pool
    yield SimpleNamespace(scheduler=made, hasher=core.request_block_hasher, pool=pool, tokens=tokens)
    bad_tokens._of_layers[id(layers)] = of_the_engine


def add(ahead, name, prompt):
    from vllm import SamplingParams
    from vllm.v1.request import Request

    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    ahead.scheduler.add_request(Request(name, prompt, params, None, block_hasher=ahead.hasher))


def output(step, nan=()):
    from vllm.v1.outputs import ModelRunnerOutput

    names = list(step.num_scheduled_tokens)
    return ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: index for index, name in enumerate(names)},
        sampled_token_ids=[[7] for _ in names],
        num_nans_in_logits={name: int(name in nan) for name in names},
    )


def ended(outputs):
    return {each.request_id: (str(each.finish_reason), each.new_token_ids) for each in outputs[0].outputs}


def test_a_failing_request_and_those_that_read_its_blocks_end_though_a_step_of_them_is_in_flight(ahead):
    start, prompt = ahead.pool.get_num_free_blocks(), random_prompts([200])[0]
    add(ahead, "bad", prompt)
    first = ahead.scheduler.schedule()
    add(ahead, "reader", [*prompt, 1, 2, 3])
    add(ahead, "other", random_prompts([200], seed=1)[0])
    second = ahead.scheduler.schedule()
    assert second.num_scheduled_tokens["reader"] < 64  # the others are those of the first
    failed = ended(ahead.scheduler.update_from_output(first, output(first, nan={"bad"})))
    assert failed == {"bad": ("error", []), "reader": ("error", [])}
    after = ended(ahead.scheduler.update_from_output(second, output(second)))
    assert after == {"other": ("None", [7])}
    # Nothing of the failed ones is hit again, and no block is lost.
    add(ahead, "again", prompt)
    third = ahead.scheduler.schedule()
    assert third.num_scheduled_tokens["again"] == 200
    ahead.scheduler.finish_requests(["again", "other"], type(ahead.scheduler.requests["other"].status).FINISHED_ABORTED)
    assert ahead.pool.get_num_free_blocks() == start


def test_no_block_of_a_failed_request_is_hit_again(ahead):
    """Not those of steps before, either: a token there may be bad and unreported."""
    prompt = random_prompts([200], seed=2)[0]
    add(ahead, "bad", prompt)
    for nan in ((), (), {"bad"}):
        step = ahead.scheduler.schedule()
        outputs = ahead.scheduler.update_from_output(step, output(step, nan))
    assert ended(outputs) == {"bad": ("error", [])}
    add(ahead, "again", prompt)
    assert ahead.scheduler.schedule().num_scheduled_tokens["again"] == 200


def test_blocks_of_a_request_that_was_preempted_before_it_failed_serve_no_hit(ahead):
    prompt = random_prompts([200], seed=3)[0]
    add(ahead, "bad", prompt)
    step = ahead.scheduler.schedule()
    ahead.scheduler._preempt_request(ahead.scheduler.running.pop(), 0.0)
    assert ended(ahead.scheduler.update_from_output(step, output(step, nan={"bad"}))) == {"bad": ("error", [])}
    add(ahead, "again", prompt)
    assert ahead.scheduler.schedule().num_scheduled_tokens["again"] == 200


def aborted(ahead, name):
    from vllm.v1.request import RequestStatus

    ahead.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)


def ended_by_vllm(ahead, name):
    from vllm.v1.request import RequestStatus

    ahead.scheduler.finish_requests(iter([name]), RequestStatus.FINISHED_ERROR)


def preempted(ahead, name):
    running = ahead.scheduler.running
    ahead.scheduler._preempt_request(running.pop([each.request_id for each in running].index(name)), 0.0)


@pytest.mark.parametrize("lose", [aborted, ended_by_vllm, preempted])
def test_readers_of_a_bad_block_fail_though_its_writer_has_lost_it(lose, ahead):
    start, prompt = ahead.pool.get_num_free_blocks(), random_prompts([200], seed=6)[0]
    add(ahead, "bad", prompt)
    first = ahead.scheduler.schedule()
    add(ahead, "reader", [*prompt, 1, 2, 3])
    add(ahead, "other", random_prompts([100], seed=7)[0])
    second = ahead.scheduler.schedule()
    lose(ahead, "bad")
    report(ahead, 1, 0, 40)
    failed = ended(ahead.scheduler.update_from_output(first, output(first)))
    assert failed.pop("bad", ("error", [])) == ("error", []) and failed == {"reader": ("error", [])}
    after = ended(ahead.scheduler.update_from_output(second, output(second)))
    assert after == {"other": ("None", [7])}
    assert not ahead.scheduler._lost
    add(ahead, "again", prompt)
    assert ahead.scheduler.schedule().num_scheduled_tokens["again"] == 200
    for name in list(ahead.scheduler.requests):
        aborted(ahead, name)
    assert ahead.pool.get_num_free_blocks() == start


def test_blocks_of_an_aborted_request_that_was_good_are_hit(ahead):
    prompt = random_prompts([200], seed=6)[0]
    add(ahead, "aborted", prompt)
    step = ahead.scheduler.schedule()
    aborted(ahead, "aborted")
    ahead.scheduler.update_from_output(step, output(step))
    add(ahead, "again", prompt)
    assert ahead.scheduler.schedule().num_scheduled_tokens["again"] == 200 - 192


def test_a_lost_block_that_holds_another_requests_tokens_by_now_fails_nobody(ahead):
    add(ahead, "bad", random_prompts([200], seed=6)[0])
    steps = [ahead.scheduler.schedule() for _ in range(2)]
    aborted(ahead, "bad")
    ahead.scheduler.update_from_output(steps[0], output(steps[0]))
    (lost,) = ahead.scheduler._lost.values()
    for block, content in (each for group in lost for each in group if each[1] is not None):
        ahead.pool._maybe_evict_cached_block(ahead.pool.blocks[block])
        assert ahead.pool.blocks[block].block_hash != content
    report(ahead, 2, 0, 200)
    assert ahead.scheduler._blocks_from("bad", 0) == set()
    assert ahead.scheduler.update_from_output(steps[1], output(steps[1])) == {}


def test_an_output_of_no_step_is_left_to_vllm(ahead):
    from vllm.v1.core.sched.output import SchedulerOutput

    add(ahead, "good", random_prompts([100], seed=5)[0])
    step, empty = ahead.scheduler.schedule(), SchedulerOutput.make_empty()
    assert ahead.scheduler.update_from_output(empty, output(empty)) == {}
    assert ended(ahead.scheduler.update_from_output(step, output(step))) == {"good": ("None", [7])}


@pytest.mark.parametrize(
    ("drafts", "sampled", "rows", "failing"),
    [
        ({}, [[1], [1], [1]], [0, 1, 0], ["b"]),
        ({}, [[1], [], [1]], [0, 1, 0], ["b"]),  # a prompt chunk that is not the last chooses no token
        ({"a": [5, 6]}, [[1, 1], [1], [1]], [0, 1, 0], ["a"]),
        ({"a": [5, 6]}, [[1, 1], [1], [1]], [0, 0, 1], []),  # a rejected draft's
        ({"a": [5]}, [[1], [1], [1]], [0, 0, 1], ["b"]),
        ({"c": [5]}, [[1], [1], [1, 1]], [0, 0, 1], ["c"]),
    ],
)
def test_rows_of_logits_belong_to_requests_with_their_drafts(drafts, sampled, rows, failing):
    from elastickv.vllm.fail_on_nan_scheduler import FailOnNanScheduler

    scheduler = FailOnNanScheduler.__new__(FailOnNanScheduler)
    scheduler.parallel_config = SimpleNamespace()
    names = ["a", "b", "c"]
    made = SimpleNamespace(
        num_nans_in_logits=dict(zip(names, rows, strict=True)),
        req_id_to_index={name: index for index, name in enumerate(names)},
        sampled_token_ids=sampled,
    )
    assert list(scheduler._with_nan(SimpleNamespace(scheduled_spec_decode_tokens=drafts), made)) == failing


def report(ahead, step, place, position):
    """Let the model report a key that is too large of a request at a place of a step's batch."""
    ahead.tokens.reported[step % 4, 0, place] = BadToken(0, position, too_large=True).word


def test_a_token_fails_the_request_at_its_place_in_its_own_step(ahead):
    """With asynchronous scheduling the next step's tokens may be reported before the output of this one has come."""
    add(ahead, "innocent", random_prompts([300], seed=3)[0])
    first = ahead.scheduler.schedule()
    add(ahead, "bad", random_prompts([180], seed=4)[0])
    second = ahead.scheduler.schedule()
    order = [*second.num_scheduled_tokens]
    place = order.index("bad")
    order[0], order[place] = order[place], order[0]  # a runner orders each batch anew
    report(ahead, 2, 0, 150)
    assert ended(ahead.scheduler.update_from_output(first, output(first))) == {"innocent": ("None", [7])}
    made = output(second)
    made.req_ids, made.req_id_to_index = order, {name: index for index, name in enumerate(order)}
    after = ended(ahead.scheduler.update_from_output(second, made))
    assert after == {"bad": ("error", []), "innocent": ("None", [7])}


def test_a_token_of_a_step_fails_its_request_though_the_next_step_is_in_flight(ahead):
    add(ahead, "bad", random_prompts([300], seed=3)[0])
    first = ahead.scheduler.schedule()
    add(ahead, "innocent", random_prompts([180], seed=4)[0])
    second = ahead.scheduler.schedule()
    report(ahead, 1, 0, 150)
    assert ended(ahead.scheduler.update_from_output(first, output(first))) == {"bad": ("error", [])}
    assert ended(ahead.scheduler.update_from_output(second, output(second))) == {"innocent": ("None", [7])}


def test_all_requests_of_a_step_with_a_bad_token_fail(ahead):
    for number in range(4):
        add(ahead, f"request {number}", random_prompts([100], seed=number)[0])
    step = ahead.scheduler.schedule()
    report(ahead, 1, 1, 50)
    report(ahead, 1, 3, 7)
    assert {name: reason for name, (reason, _) in ended(ahead.scheduler.update_from_output(step, output(step))).items()} == {
        "request 0": "None",
        "request 1": "error",
        "request 2": "None",
        "request 3": "error",
    }


def test_what_was_reported_before_the_first_step_fails_no_request(ahead):
    """Where a model is warmed up, its requests are made up."""
    for row in range(4):
        report(ahead, row, 0, 5)
    add(ahead, "good", random_prompts([100], seed=5)[0])
    for _ in range(6):
        step = ahead.scheduler.schedule()
        assert ended(ahead.scheduler.update_from_output(step, output(step))) == {"good": ("None", [7])}


@pytest.mark.parametrize(("position", "fails"), [(104, False), (103, True)], ids=["a rejected draft", "an accepted one"])
def test_a_rejected_draft_that_could_not_be_stored_fails_no_request(position, fails):
    """A step of one token and four drafts, of which three are accepted."""
    from elastickv.vllm.fail_on_nan_scheduler import _with_bad_tokens

    step = SimpleNamespace(num_scheduled_tokens={"one": 5}, scheduled_spec_decode_tokens={"one": [1, 2, 3, 4]})
    chosen = SimpleNamespace(req_id_to_index={"one": 0}, sampled_token_ids=[[1, 2, 3, 9]])
    tokens = {0: BadToken(0, position, too_large=False)}
    assert _with_bad_tokens(step, chosen, {"one": range(100, 105)}, tokens) == ({"one": position} if fails else {})


@pytest.mark.parametrize(
    ("scheduled", "known", "first"),
    [(203, 201, 200), (200, 201, 200), (64, 200, 64)],
    ids=["drafts before were rejected", "drafts before were accepted", "a chunk of a prompt"],
)
def test_a_step_begins_at_the_last_known_token_whatever_was_scheduled_ahead(scheduled, known, first):
    scheduler, step = of_two_requests(scheduled, known)
    assert scheduler._computed(step)["one"] == range(first, first + 4)


def test_a_token_of_a_request_that_has_ended_since_fails_no_request():
    scheduler, step = of_two_requests(203, 201)
    chosen = SimpleNamespace(req_id_to_index={"ended": 0, "one": 1}, sampled_token_ids=[[], [7]], num_nans_in_logits={})
    assert scheduler._suspects(step, chosen, {0: BadToken(0, 97, too_large=False)}) == {}
    assert scheduler._suspects(step, chosen, {1: BadToken(0, 203, too_large=False)}) == {"one": 203}


def of_two_requests(scheduled, known):
    """Return a scheduler and a step of three drafts each of a request of `known` tokens and of one that has ended."""
    from elastickv.vllm.fail_on_nan_scheduler import FailOnNanScheduler

    scheduler = FailOnNanScheduler.__new__(FailOnNanScheduler)
    scheduler.requests = {"one": SimpleNamespace(num_tokens=known)}
    scheduler.num_spec_tokens, scheduler.vllm_config = 3, SimpleNamespace(max_concurrent_batches=2)
    step = SimpleNamespace(
        num_scheduled_tokens={"one": 4, "ended": 4},
        scheduled_spec_decode_tokens={},
        scheduled_new_reqs=[],
        scheduled_cached_reqs=SimpleNamespace(req_ids=["one", "ended"], num_computed_tokens=[scheduled, 100]),
    )
    return scheduler, step
