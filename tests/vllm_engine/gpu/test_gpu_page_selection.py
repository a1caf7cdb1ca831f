"""Decodes that read the best pages alone, by kernels in captured graphs: answers in bfloat16 are near the plain model's."""

import numpy as np
import pytest

from benchmarks.read_rule import ReadRule
from elastickv.recipe import AttentionShape, Recipe
from elastickv.vllm import model_setup
from elastickv.vllm.layer_formats import ServedModel, at_ratio
from tests.helpers.rounded_answers import agree, distance
from tests.helpers.serving_scenarios import CHUNKED, NGRAM, SMALL_POOL, WINDOW, random_prompts

pytestmark = pytest.mark.gpu
RECIPES = {0: "int4,pages=1/4:1/2,anchor_every=4", 1: "int4,pages=1/3,anchor_every=3"}
PARSED = {layer: Recipe.parse(f"{text},sinks=0,window={WINDOW}") for layer, text in RECIPES.items()}
OTHERS = (
    {0: "int4", 1: "int4"},
    {0: "int4,pages=1/4:1/2,anchor_every=16", 1: "int4,pages=1/3,anchor_every=16"},
    {0: "int4,pages=1/2:1/4,anchor_every=4", 1: "int4,pages=2/3,anchor_every=3"},
)
LENGTHS, NEW_TOKENS = (700, 37, 500, 64, 5, 900), 90
ENGINE = CHUNKED | {"elastickv": {"compress": 4}}


@pytest.fixture(scope="module")
def selecting(serve, serve_bf16):
    """Return engines whose layers have these recipes, as a calibration may choose them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_setup, "layer_recipes", lambda *arguments: PARSED)
        serve.close()
        yield lambda **options: serve_bf16(**(ENGINE | options))
        serve.close()


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(LENGTHS, seed=3)


def near(rounded_rule, answers, layers=RECIPES, others=OTHERS):
    """Assert that answers to long prompts are nearest to the plain model with their own selection."""
    answers = [answer for answer in answers if len(answer.prompt) > 200]
    own = distance(rounded_rule(layers=layers), answers)
    others = [distance(rounded_rule(layers=each), answers) for each in others]
    print(f"measured: {own:.4f} from the own rule, {', '.join(f'{other:.4f}' for other in others)} from others")
    assert own < min(others) / 3


@pytest.fixture(scope="module")
def together(selecting, prompts):
    return selecting().generate(prompts, NEW_TOKENS)


def test_answers_follow_the_rule_of_selected_pages(together, rounded_rule):
    near(rounded_rule, together)


@pytest.mark.parametrize("count", [1, 3, 5, 8])
def test_batches_of_any_size_follow_the_rule(selecting, rounded_rule, count):
    """Sizes with a graph of their own and sizes that are padded to the next."""
    near(rounded_rule, selecting().generate(random_prompts([450 + 31 * i for i in range(count)], count), NEW_TOKENS))


def test_lists_of_pages_are_those_of_the_rule(selecting, rounded_rule, prompts, device, monkeypatch):
    """Numbers in bfloat16 rarely change which pages are the best."""
    if device == "cpu":
        pytest.skip("lists in device memory")
    engine, of_rules, lists = selecting(), [], ReadRule.lists
    answer = engine.generate([prompts[0]], 41)[0]

    def record(self, *given):
        of_rules.append(lists(self, *given))
        return of_rules[-1]

    monkeypatch.setattr(ReadRule, "lists", record)
    rounded_rule(layers=RECIPES).logits(answer.sequence, prompt=len(answer.prompt))
    memory = model_setup.ModelSetup.newest()._device_selection._memory
    ((_, of_layers),) = memory.items()
    assert len(of_rules) == 2
    for layer, rule in enumerate(of_rules):
        anchor, of_heads = max(rule.items())
        slot = int((of_layers.headers[layer, :, 0, 0, 0] == anchor).nonzero()[0])
        for head, expected in enumerate(of_heads):
            count = int(of_layers.headers[layer, slot, 0, head, 2])
            listed = of_layers.lists[layer, slot, 0, head, :count].tolist()
            assert count == len(expected)
            assert len(set(listed) & set(expected)) >= 0.8 * count


def test_chunked_prompts_and_moves_in_the_batch_change_little(selecting, rounded_rule, prompts, together):
    engine = selecting()
    whole_step, engine.scheduler.max_num_scheduled_tokens = engine.scheduler.max_num_scheduled_tokens, 48
    answers = engine.generate(prompts, NEW_TOKENS)
    engine.scheduler.max_num_scheduled_tokens = whole_step
    near(rounded_rule, answers)


def test_requests_have_ratios_of_their_own(selecting, rounded_rule, prompts):
    """One reads every page beside others that read larger shares of them, or those of the server."""
    served = ServedModel(AttentionShape(1, 4, 2, 64), 2, context=1024)
    larger = {layer: str(recipe) for layer, recipe in at_ratio(PARSED, 3.5, served).items()}
    every = {0: "int4", 1: "int4"}
    engine, ratios = selecting(), (1, 3.5, None, 1, 3.5, None)
    asked = [{"extra_args": {"elastickv_compress": ratio}} if ratio else {} for ratio in ratios]
    own_prompts = random_prompts([900] * len(ratios), seed=5)
    for _ in range(2):  # the second time with prefixes that are cached
        names = [engine.add(prompt, NEW_TOKENS, **each) for prompt, each in zip(own_prompts, asked, strict=True)]
        answers = engine.finish(names, own_prompts)
        of_ratio = {1: every, 3.5: larger, None: RECIPES}
        for ratio, layers in of_ratio.items():
            own = [answer for answer, each in zip(answers, ratios, strict=True) if each == ratio]
            near(rounded_rule, own, layers, [other for other in of_ratio.values() if other is not layers])


def test_drafts_follow_the_rule(selecting, rounded_rule, prompts):
    engine = selecting(speculative_config=NGRAM)
    answers = engine.generate(prompts, NEW_TOKENS)
    drafted, accepted = (engine.counter(f"vllm:spec_decode_num_{name}_tokens") for name in ("draft", "accepted"))
    assert drafted > accepted > 0
    near(rounded_rule, answers)


def test_preempted_requests_go_on_and_leave_no_block_behind(selecting, rounded_rule, prompts):
    """What they generated before is computed anew with every page, so that they are nearer to the rule than to none."""
    engine = selecting(**SMALL_POOL | {"max_model_len": 1024, "num_gpu_blocks_override": 140})
    start = engine.free_blocks
    answers = engine.generate(prompts, NEW_TOKENS)
    assert sum(answer.preemptions for answer in answers) > 0 and engine.free_blocks == start
    kept = [answer for answer in answers if not answer.preemptions]
    near(rounded_rule, kept)


def test_cached_prompts_are_answered_alike(selecting, rounded_rule, prompts):
    engine = selecting()
    first = engine.generate(prompts, NEW_TOKENS)
    again = engine.generate(prompts, NEW_TOKENS)
    assert any(answer.cached for answer in again)
    near(rounded_rule, again)
    agree(lambda: rounded_rule(layers=RECIPES), again, first)


def test_aborted_requests_leave_slots_to_others(selecting, rounded_rule):
    engine, rng, running = selecting(), np.random.default_rng(0), []
    prompts = random_prompts(rng.integers(300, 800, 12).tolist(), seed=7)
    for prompt in prompts:
        running.append(engine.add(prompt, 60))
        for _ in range(6):
            engine.step()
        if len(running) > 3:
            engine.engine.abort_request([running.pop(int(rng.integers(len(running))))])
    while engine.engine.has_unfinished_requests():
        engine.step()
    near(rounded_rule, engine.generate(random_prompts([700, 640, 580], seed=8), NEW_TOKENS))
