"""Sampling with random numbers of a row's own."""

import pytest
import torch

from elastickv.errors import UsageError
from elastickv.evaluation.generations.continuation_options import ContinuationOptions
from elastickv.evaluation.generations.token_choice import TokenChoice, nucleus, texts_of

CPU = torch.device("cpu")
LOGITS = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))


def chosen(windows, steps=40, logits=LOGITS, **options):
    """Return (windows, 1 + samples, steps) tokens of equal logits in every row."""
    options = ContinuationOptions(**({"tokens": steps, "samples": 2, "top_p": 1.0} | options))
    choose = TokenChoice(options, windows, CPU)
    rows = windows * (1 + options.samples)
    tokens = torch.stack([choose(logits.expand(rows, -1)) for _ in range(steps)], 1)
    return tokens.unflatten(0, (windows, -1))


def test_the_same_logits_choose_the_same_tokens():
    assert torch.equal(chosen(2), chosen(2))
    assert not torch.equal(chosen(2), chosen(2, seed=1))


def test_the_first_row_of_a_window_is_greedy_and_the_others_differ():
    tokens = chosen(2)
    assert (tokens[:, 0] == 0).all()
    sampled = tokens[:, 1:].flatten(0, 1).tolist()
    assert len({tuple(row) for row in sampled}) == 4


def test_a_row_depends_on_no_other_row():
    assert torch.equal(chosen(1)[0], chosen(3)[0])
    assert torch.equal(chosen(2)[:, :2], chosen(2, samples=1))


def test_tokens_are_sampled_with_their_probabilities():
    """Of 8000 draws a share has a standard deviation of at most 0.0056."""
    sampled = chosen(2, steps=2000)[:, 1:].flatten()
    shares = torch.bincount(sampled, minlength=4) / len(sampled)
    torch.testing.assert_close(shares, LOGITS.exp(), rtol=0, atol=0.025)


def test_a_temperature_near_zero_is_greedy_and_a_high_one_is_uniform():
    assert (chosen(1, temperature=1e-3) == 0).all()
    shares = torch.bincount(chosen(2, steps=2000, temperature=1e3)[:, 1:].flatten(), minlength=4) / 8000
    torch.testing.assert_close(shares, torch.full((4,), 0.25), rtol=0, atol=0.025)


@pytest.mark.parametrize(("top_p", "tokens"), [(0.4, {0}), (0.5, {0}), (0.79, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})])
def test_the_nucleus_is_the_smallest_set_with_the_probability(top_p, tokens):
    shuffled = LOGITS[[3, 0, 2, 1]]
    inside = set(torch.isfinite(nucleus(LOGITS[None], top_p))[0].nonzero().flatten().tolist())
    assert inside == tokens
    assert int(torch.isfinite(nucleus(shuffled[None], top_p)).sum()) == len(tokens)
    assert set(chosen(2, steps=400, top_p=top_p)[:, 1:].flatten().tolist()) == tokens


def test_close_logits_choose_mostly_the_same_tokens():
    """That is what paired random numbers are for: independent draws agree in 0.37 of all cases."""
    agreement = (chosen(2, steps=2000) == chosen(2, steps=2000, logits=LOGITS + torch.tensor([0.0, 0.02, 0.0, -0.02])))[:, 1:]
    assert agreement.float().mean() > 0.97


def test_a_text_ends_with_its_end_token():
    assert texts_of(torch.tensor([[5, 9, 5, 9], [1, 2, 3, 4]]), {9}) == [[5, 9], [1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tokens": -1}, "`generate`=-1"),
        ({"samples": -2}, "`samples`=-2"),
        ({"temperature": 0.0}, "`temperature`=0"),
        ({"temperature": float("nan")}, "`temperature`=nan"),
        ({"temperature": float("inf")}, "`temperature`=inf"),
        ({"top_p": 0.0}, "`top_p`=0"),
        ({"top_p": 1.5}, "`top_p`=1.5"),
        ({"seed": -1}, "`seed`=-1"),
        ({"seed": 2**63}, "`seed`="),
    ],
)
def test_options_out_of_range_are_refused(options, named):
    with pytest.raises(UsageError, match=f"{named}.* out of range"):
        ContinuationOptions(**options)
