"""What may be asked of an engine on a GPU: adapters, log-probabilities, the first model runner, many requests, long steps."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from tests.helpers.read_rule import compare
from tests.helpers.rounded_answers import agree, distance, follow
from tests.helpers.served_llama import Sizes, write_model
from tests.helpers.serving_scenarios import ADAPTERS, CHUNKED, NEW_TOKENS, random_prompts

pytestmark = pytest.mark.gpu

GRAPHS_UP_TO = 16  # tokens of a step
WHOLE, CHUNK = 65536, 8192  # tokens of a step


def test_log_probabilities_of_prompts_and_of_other_tokens_follow_the_rule(serve_bf16, rounded_rule, prompts):
    engine, prompt, ended = serve_bf16(**CHUNKED), prompts[2], {}
    name = engine.add(prompt, 60, logprobs=5, prompt_logprobs=0)
    while name not in ended:
        ended |= engine.step()
    (answer,) = engine.answers(ended[name], prompt)
    follow(rounded_rule, [answer])
    of_prompt = [row[token].logprob for token, row in zip(prompt[1:], ended[name].prompt_logprobs[1:], strict=True)]
    own, other = (compare(rounded_rule(recipe).logits(prompt), 1, prompt[1:], of_prompt)[1].mean() for recipe in ("int4", None))
    print(f"measured: {own:.4f} from the prompt's own rule, {other:.4f} from no pages")
    assert own < other
    rows = ended[name].outputs[0].logprobs
    ranked = [sorted((each.rank, -each.logprob) for each in row.values()) for row in rows]
    assert all(ranks == sorted(ranks, key=lambda each: each[1]) and len(ranks) >= 5 for ranks in ranked)


def test_requests_with_an_adapter_and_without_are_served_together(serve_bf16, rounded_rule, prompts, adapter, device):
    folder, added = adapter
    engine = serve_bf16(**CHUNKED, **ADAPTERS)
    with_adapter = [engine.add(prompt, 60, lora=folder) for prompt in prompts]
    if device == "cpu":  # vLLM 0.32 on CPUs applies the adapter to all requests of a step
        own, plain = engine.finish(with_adapter, prompts), engine.generate(prompts, 60)
    else:
        names = with_adapter + [engine.add(prompt, 60) for prompt in prompts[:3]]
        own, plain = np.split(np.array(engine.finish(names, [*prompts, *prompts[:3]]), dtype=object), [len(prompts)])
    follow(partial(rounded_rule, added=added), own)
    follow(rounded_rule, plain)
    assert distance(rounded_rule(added=added), own) < distance(rounded_rule(), own)
    assert distance(rounded_rule(), plain) < distance(rounded_rule(added=added), plain)
    assert all(answer.cached == 0 for answer in plain)


def test_more_requests_than_graphs_are_captured_for_follow_the_rule(serve_bf16, rounded_rule, device):
    limits = {"max_num_seqs": 40, "max_num_batched_tokens": 1024}
    if device == "cuda":
        limits["compilation_config"] = {"max_cudagraph_capture_size": GRAPHS_UP_TO}
    engine = serve_bf16(**limits)
    if device == "cuda":
        assert engine.engine.vllm_config.compilation_config.max_cudagraph_capture_size == GRAPHS_UP_TO
    follow(rounded_rule, engine.generate(random_prompts(np.arange(70, 110), seed=5), 60))


def test_the_first_model_runner_gives_the_same_answers(serve_bf16, rounded_rule, prompts, graphed):
    engine = serve_bf16(**CHUNKED, environment={"VLLM_USE_V2_MODEL_RUNNER": "0"})
    assert not engine.runner_module.startswith("vllm.v1.worker.gpu.")
    answers = engine.generate(prompts, NEW_TOKENS)
    follow(rounded_rule, answers)
    agree(rounded_rule, answers, graphed)
    again = engine.generate(prompts, 40)
    assert sum(answer.cached for answer in again) > 0
    follow(rounded_rule, again)


def test_rotated_layers_follow_the_rule_of_rotated_pages(serve_bf16, rounded_rule, prompts, monkeypatch):
    """A calibration rotates layers and smooths their keys; here the recipes are changed where the engine gets them."""
    from elastickv.vllm import model_setup

    sizes, rotate = Sizes(), {0: "v", 1: "kv"}
    head = [tuple((channel * factor) % 5 - 2 for channel in range(sizes.head_dim)) for factor in range(3, 3 + sizes.kv_heads)]
    solved, smoothing = model_setup.layer_recipes, {0: tuple(head), 1: tuple(head[::-1])}
    monkeypatch.setattr(
        model_setup,
        "layer_recipes",
        lambda *given: {layer: replace(recipe, rotate=rotate[layer]) for layer, recipe in solved(*given).items()},
    )
    monkeypatch.setattr(model_setup, "layer_smoothing", lambda options: smoothing)
    # Another number of requests: engines are kept by their options.
    answers = serve_bf16(**CHUNKED, max_num_seqs=6).generate(prompts, NEW_TOKENS)
    layers = {layer: f"int4,rotate={each}" for layer, each in rotate.items()}
    own, plain = distance(rounded_rule(layers=layers, smoothing=smoothing), answers), distance(rounded_rule(), answers)
    print(f"measured: {own:.4f} from the rule of rotated pages, {plain:.4f} from that of others")
    assert own < plain


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory, weights):
    return write_model(tmp_path_factory.mktemp("long") / "llama", weights, Sizes(positions=WHOLE))


def test_a_long_prompt_in_one_step_gives_the_log_probabilities_of_chunks(serve_bf16, rounded_rule, long_folder, device):
    """The plain model says what its beginning must be; it would take too much memory for all of it."""
    length, chunk = (40000, CHUNK) if device == "cuda" else (1200, 256)
    engine = serve_bf16(folder=long_folder, max_model_len=length + 100, max_num_batched_tokens=WHOLE, max_num_seqs=4)
    (prompt,) = random_prompts([length], seed=3)
    whole_step = engine.scheduler.max_num_scheduled_tokens
    found = []
    for step in (whole_step, chunk):
        engine.scheduler.max_num_scheduled_tokens = step
        before, ended, name = engine.steps, {}, engine.add(prompt, 4, prompt_logprobs=0)
        while name not in ended:
            ended |= engine.step()
        found.append([row[token].logprob for token, row in zip(prompt[1:], ended[name].prompt_logprobs[1:], strict=True)])
        print(f"measured: {engine.steps - before} steps")
    engine.scheduler.max_num_scheduled_tokens = whole_step
    between = np.abs(np.subtract(*found)).mean()
    few = prompt[:1000]
    own, other = (
        compare(rounded_rule(recipe).logits(few), 1, few[1:], found[0][: len(few) - 1])[1].mean() for recipe in ("int4", None)
    )
    print(f"measured: {between:.4f} between the two, {own:.4f} from the rule, {other:.4f} from no pages")
    assert between < other, "chunks differ from the whole by more than pages do from 16 bit"
    assert own < other
