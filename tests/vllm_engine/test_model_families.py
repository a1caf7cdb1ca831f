"""Each family of models is served: within the window as by the stock backend, beyond it from pages.

Models have two layers and random weights; the stock backend runs in float32 too.
"""

from types import SimpleNamespace

import numpy as np
import pytest

from tests.helpers.model_families import FAMILIES, VOCABULARY, write_family

WINDOW, NEW_TOKENS = 128, 16
LENGTHS = (60, 100, 300, 201)
# float32 sums in another order.
ROUNDING = 5e-4
# Where a key or value is rounded to the next code, as in other steps it may be.
OTHER_CODES = 3e-3
# 8-bit keys and values.
NEAR = 0.03


def prompts():
    rng = np.random.default_rng(3)
    return [rng.integers(0, VOCABULARY, length).tolist() for length in LENGTHS]


def scores(engine, asked):
    """Return the log-probabilities of each prompt's tokens but the first."""
    names, ended = [engine.add(prompt, 1, prompt_logprobs=0) for prompt in asked], {}
    while engine.engine.has_unfinished_requests():
        ended |= engine.step()
    rows = [ended[name].prompt_logprobs[1:] for name in names]
    return [
        np.array([row[token].logprob for token, row in zip(prompt[1:], found, strict=True)])
        for prompt, found in zip(asked, rows, strict=True)
    ]


@pytest.fixture(scope="module", params=FAMILIES)
def served(request, serve, tmp_path_factory):
    folder = write_family(request.param, tmp_path_factory.mktemp(request.param))
    asked, shared = prompts(), {"folder": folder, "enable_prefix_caching": True, "max_num_batched_tokens": 384}
    engine = serve(None, **shared)
    stock, stock_scores = engine.generate(asked, NEW_TOKENS), scores(engine, asked)
    engine = serve("int8", WINDOW, **shared)
    found = SimpleNamespace(asked=asked, stock=stock, stock_scores=stock_scores, scores=scores(engine, asked))
    engine.forget_prefixes()
    found.whole = [engine.generate([prompt], NEW_TOKENS)[0] for prompt in asked]
    found.hits = engine.generate(asked, NEW_TOKENS)
    engine.forget_prefixes()
    found.chunked = engine.generate(asked, NEW_TOKENS)
    return found


def test_texts_within_the_window_are_answered_as_by_the_stock_backend(served):
    for stock, ours in zip(served.stock[:2], served.whole[:2], strict=True):
        assert ours.tokens == stock.tokens
        assert np.allclose(ours.logprobs, stock.logprobs, rtol=0, atol=ROUNDING)
    for stock, ours in zip(served.stock_scores, served.scores, strict=True):
        assert np.allclose(ours[: WINDOW - 1], stock[: WINDOW - 1], rtol=0, atol=ROUNDING)


def test_longer_texts_read_pages(served):
    for stock, ours in zip(served.stock_scores[2:], served.scores[2:], strict=True):
        difference = np.abs(ours - stock)[WINDOW + 31 :]
        assert np.median(difference) < NEAR
        assert difference.max() > 4 * ROUNDING


def test_chunks_and_prefix_hits_answer_as_the_whole_prompt(served):
    assert all(answer.cached == 0 for answer in served.whole + served.chunked)
    assert [answer.cached for answer in served.hits] == [length // 32 * 32 for length in LENGTHS]
    for others in (served.hits, served.chunked):
        for whole, other in zip(served.whole, others, strict=True):
            same = sum(np.cumprod(np.equal(whole.tokens, other.tokens)))
            assert same
            difference = np.abs(np.subtract(whole.logprobs[:same], other.logprobs[:same]))
            assert np.median(difference) < OTHER_CODES
