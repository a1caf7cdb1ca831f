"""Decodes that read the best pages alone: what each token reads depends on its position and its past, not on the schedule."""

import pickle

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor

from benchmarks.read_rule import ReadRule
from elastickv.recipe import AttentionShape, Recipe
from elastickv.vllm import model_setup
from elastickv.vllm.layer_formats import ServedModel, at_ratio
from elastickv.vllm.selection.decode_selection import DecodeSelection
from elastickv.vllm.selection.request_ratios import StepRatios, ratios_of_step
from tests.helpers.read_rule import follows
from tests.helpers.serving_scenarios import NGRAM, SMALL_POOL, WINDOW, all_equal, all_follow, random_prompts

RECIPES = {0: "int4,pages=1/4:1/2,anchor_every=4", 1: "int4,pages=1/3,anchor_every=3"}
PARSED = {layer: Recipe.parse(f"{text},sinks=0,window={WINDOW}") for layer, text in RECIPES.items()}
LENGTHS, NEW_TOKENS = (300, 37, 200, 64, 5), 90
STRICT = {"compress": 4, "prefix_reuse": "strict"}
CACHED = {"enable_prefix_caching": True, **SMALL_POOL}


@pytest.fixture(scope="module")
def selecting(serve):
    """Return engines whose layers have these recipes, as a calibration may choose them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_setup, "layer_recipes", lambda *arguments: PARSED)
        serve.close()
        yield lambda **options: serve(**{"elastickv": {"compress": 4}} | options)
        serve.close()


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(LENGTHS, seed=3)


@pytest.fixture(scope="module")
def selected(rule):
    return rule(layers=RECIPES)


@pytest.fixture(scope="module")
def together(selecting, prompts):
    return selecting().generate(prompts, NEW_TOKENS)


def test_answers_follow_the_rule_of_selected_pages(together, selected):
    all_follow(selected, together)


@pytest.mark.parametrize(
    "other",
    [
        {0: "int4", 1: RECIPES[1]},
        {0: RECIPES[0], 1: "int4,pages=1/3,anchor_every=4"},
        {0: "int4,pages=1/2:1/4,anchor_every=4", 1: RECIPES[1]},
    ],
    ids=["every page", "other anchors", "other heads"],
)
def test_another_selection_is_noticed(together, rule, other):
    for answer in (together[0], together[2]):
        assert follows(rule(layers=other), answer) is not None


def test_lists_of_pages_are_those_of_the_rule(selecting, selected, prompts, monkeypatch):
    """The plain model's queries and keys are those of the engine up to rounding, which rarely changes an order of pages."""
    listed, keep = {}, DecodeSelection.keep

    def record(self, requests, pages):
        for anchor, lists in zip(pages.anchors, pages.lists[0], strict=True):
            of_heads = [page[:count].tolist() for page, count in zip(lists, anchor[-len(lists) :], strict=True)]
            listed.setdefault(id(self), {})[int(requests.lengths[0]) - 1] = of_heads
        keep(self, requests, pages)

    monkeypatch.setattr(DecodeSelection, "keep", record)
    answer, lists_of_rules, lists = selecting().generate([prompts[0]], 40)[0], [], ReadRule.lists

    def record_rule(self, *given):
        lists_of_rules.append(lists(self, *given))
        return lists_of_rules[-1]

    monkeypatch.setattr(ReadRule, "lists", record_rule)
    selected.logits(answer.sequence, prompt=len(answer.prompt))
    assert len(listed) == len(lists_of_rules) == 2
    for engine, rule in zip(listed.values(), lists_of_rules, strict=True):
        assert engine.keys() == rule.keys() and len(rule) >= 10
        assert np.mean([engine[anchor] == rule[anchor] for anchor in rule]) > 0.9


def test_a_wrong_page_is_noticed(selecting, selected, prompts, monkeypatch):
    keep = DecodeSelection.keep

    def keep_another(self, requests, pages):
        for anchor, lists in zip(pages.anchors, pages.lists[0], strict=True):
            lists[1, anchor[-1] - 1] = (lists[1, anchor[-1] - 1] + 1) % anchor[2]
        keep(self, requests, pages)

    monkeypatch.setattr(DecodeSelection, "keep", keep_another)
    assert follows(selected, selecting().generate([prompts[0]], NEW_TOKENS)[0]) is not None


def test_a_list_that_is_forgotten_is_noticed(selecting, selected, prompts, monkeypatch):
    monkeypatch.setattr(DecodeSelection, "keep", lambda *given: None)
    assert follows(selected, selecting().generate([prompts[0]], NEW_TOKENS)[0]) is not None


def test_chunked_prompts_and_moves_in_the_batch_change_no_answer(selecting, selected, prompts, together):
    engine = selecting()
    whole_step, engine.scheduler.max_num_scheduled_tokens = engine.scheduler.max_num_scheduled_tokens, 48
    answers = engine.generate(prompts, NEW_TOKENS)
    engine.scheduler.max_num_scheduled_tokens = whole_step
    all_equal(selected, answers, together)


def test_requests_have_ratios_of_their_own(selecting, rule, selected, prompts, together):
    """One reads every page beside others that read larger shares of them, or those of the server."""
    served = ServedModel(AttentionShape(1, 4, 2, 64), 2, context=1024, dtype="fp32")
    larger = {layer: str(recipe) for layer, recipe in at_ratio(PARSED, 3.5, served).items()}
    assert larger != {layer: str(recipe) for layer, recipe in PARSED.items()}
    engine, ratios = selecting(), (1, 3.5, None)
    asked = [{"extra_args": {"elastickv_compress": ratio}} if ratio else {} for ratio in ratios]
    names = [engine.add(prompts[0], 60, **each) for each in asked]
    answers = engine.finish(names, [prompts[0]] * len(names))
    for answer, of_its_ratio in zip(answers, (rule(), rule(layers=larger), selected), strict=True):
        reasons = [follows(model, answer) is None for model in (rule(), rule(layers=larger), selected)]
        assert reasons == [model is of_its_ratio for model in (rule(), rule(layers=larger), selected)]


BAD_RATIOS = [0.5, 4.1, "4", True, float("nan")]


@pytest.mark.parametrize("ratio", BAD_RATIOS)
def test_a_request_with_another_ratio_is_refused_when_it_comes(selecting, prompts, together, ratio):
    engine = selecting()
    with pytest.raises(VLLMValidationError) as refused:
        engine.add(prompts[4], 8, extra_args={"elastickv_compress": ratio})
    assert refused.value.parameter == "elastickv_compress"
    assert f"elastickv_compress={ratio!r} is out of range: give a number from 1, every page, to 4" in str(refused.value)
    assert not engine.engine.has_unfinished_requests()
    assert engine.generate([prompts[4]], 8)[0].tokens == together[4].tokens[:8]


def test_an_engine_without_elastickv_does_not_look_at_ratios(serve, prompts):
    engine = serve(fmt=None)
    assert len(engine.generate([prompts[4]], 8, extra_args={"elastickv_compress": 0.5})[0].tokens) == 8


@pytest.mark.parametrize("ratio", BAD_RATIOS)
def test_a_ratio_that_another_front_end_lets_pass_ends_its_request_in_one_line_and_the_engine_goes_on(
    selecting, prompts, together, caplog, monkeypatch, ratio
):
    engine = selecting()
    monkeypatch.setattr(InputProcessor, "_validate_params", InputProcessor._validate_params.__wrapped__)
    bad, good = engine.add(prompts[4], 8, extra_args={"elastickv_compress": ratio}), engine.add(prompts[4], 8)
    ended = {}
    while engine.engine.has_unfinished_requests():
        ended |= engine.step()
    assert (ended[bad].outputs[0].finish_reason, len(ended[bad].outputs[0].token_ids)) == ("error", 0)
    assert ended[good].outputs[0].token_ids == together[4].tokens[:8]
    said = [record.getMessage() for record in caplog.records if "is refused" in record.getMessage()]
    assert len(said) == 1 and "give a number from 1, every page, to 4" in said[0] and "\n" not in said[0]


def test_ratios_arrive_where_the_step_is_unpickled():
    pickled = pickle.dumps(StepRatios({7: 2.0}))
    assert ratios_of_step() == {}
    pickle.loads(pickled)
    assert ratios_of_step() == {7: 2.0}
    pickle.loads(pickle.dumps(StepRatios({})))
    assert ratios_of_step() == {}


def test_strict_hits_of_an_answer_end_within_its_prompt(selecting, selected):
    engine = selecting(elastickv=STRICT, **CACHED)
    prompt = random_prompts([200], seed=8)[0]
    first = engine.generate([prompt], 60)[0]
    second = engine.generate([[*prompt, *first.tokens, 7]], 20)[0]
    assert 0 < second.cached <= len(prompt)
    all_follow(selected, [first, second], window_first=False)


def test_preempted_requests_read_the_lists_that_they_had(selecting, selected, prompts, together):
    """What they generated before is computed in chunks, whose tokens select as decodes do."""
    answers = selecting(elastickv=STRICT, **CACHED).generate(prompts, NEW_TOKENS)
    assert sum(answer.preemptions for answer in answers) > 0
    all_equal(selected, answers, together)


RAGGED = [(int(n), int(m)) for n, m in np.random.default_rng(4).integers((1, 3), (260, 30), (9, 2))]


@pytest.fixture(scope="module")
def ragged(selecting, selected):
    """Prompts with their answers by an engine that gets one after the other."""
    prompts = random_prompts([length for length, _ in RAGGED], seed=9)
    engine = selecting(elastickv=STRICT, **CACHED)
    alone = [engine.generate([prompt], count)[0] for prompt, (_, count) in zip(prompts, RAGGED, strict=True)]
    return prompts, alone


@given(
    order=st.permutations(range(len(RAGGED))),
    gaps=st.lists(st.integers(0, 3), min_size=len(RAGGED), max_size=len(RAGGED)),
    chunk=st.integers(32, 300),
    aborted=st.sets(st.integers(0, len(RAGGED) - 1), max_size=3),
)
@settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate])  # an example takes seconds: none is shrunk
def test_any_schedule_gives_the_answers_of_requests_alone(selecting, selected, ragged, order, gaps, chunk, aborted):
    prompts, expected = ragged
    engine = selecting(elastickv=STRICT, **CACHED)
    start = engine.free_blocks
    requests = [(prompt, count) for prompt, (_, count) in zip(prompts, RAGGED, strict=True)]
    ended = engine.finish_schedule(requests, order, gaps, chunk, aborted)
    answered = [number for number in ended if number not in aborted]
    assert len(answered) >= len(RAGGED) - 3
    all_equal(selected, [expected[number] for number in answered], [ended[number] for number in answered])
    assert engine.free_blocks == start


def test_a_soft_hit_without_its_window_reads_pages_and_selects_among_them(selecting, selected):
    engine, prompt = selecting(**CACHED), random_prompts([200], seed=6)[0]
    engine.generate([prompt], 4)
    engine.evict_windows()
    answer = engine.generate([[*prompt[:196], 7]], 60)[0]
    assert answer.cached == 192 and answer.window_first[192] == 192
    assert follows(selected, answer) is None
    assert follows(selected, answer, window_first=False) is not None


def test_drafts_change_no_answer_nor_do_they_when_requests_are_preempted(selecting, selected, prompts, together):
    engine = selecting(speculative_config=NGRAM, **SMALL_POOL)
    answers = engine.generate(prompts, NEW_TOKENS)
    drafted, accepted = (engine.counter(f"vllm:spec_decode_num_{name}_tokens") for name in ("draft", "accepted"))
    assert drafted > accepted > 0 and sum(answer.preemptions for answer in answers) > 0
    all_equal(selected, answers, together)
