"""Unsupported operations raise an error instead of silently diverging from the stock cache."""

import pytest
import torch
import transformers as tf

import elastickv.transformers as ekv
from elastickv.errors import NonFiniteError, UsageError
from elastickv.transformers.padding import Padding
from tests.helpers.model_matrix import model, padded, prompt

HELD = 60


@pytest.fixture(scope="module")
def tiny():
    return model("llama")


def ones(*shape):
    return torch.ones(shape, dtype=torch.int64)


def without(mask, *place):
    mask[place] = 0
    return mask


def causal(new, dtype=torch.bool):
    """Return a four-dimensional mask that shows stored tokens and the new ones up to each query's own."""
    seen = torch.cat([torch.ones(new, HELD), torch.ones(new, new).tril()], 1).bool()[None, None].repeat(2, 1, 1, 1)
    return seen if dtype is torch.bool else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(dtype).min)


GOES_ON = {
    "none": (1, lambda: None),
    "of tokens": (1, lambda: ones(2, HELD + 1)),
    "of tokens and of what may come": (1, lambda: ones(2, HELD + 9)),
    "of a chunk": (3, lambda: ones(2, HELD + 3)),
    "of a chunk with padding": (3, lambda: without(ones(2, HELD + 3), 0, HELD)),
    "of truths": (3, lambda: causal(3)),
    "of numbers": (3, lambda: causal(3, torch.float32)),
}
REFUSED = {
    "hides a token that is held": (1, lambda: without(ones(2, HELD + 1), 0, 5), "hides tokens"),
    "hides one from a chunk": (3, lambda: without(ones(2, HELD + 3), 0, 5), "hides tokens"),
    "of the new token alone": (1, lambda: ones(2, 1), "1 columns"),
    "of the new tokens alone": (3, lambda: ones(2, 3), "3 columns"),
    "too short": (1, lambda: ones(2, 40), "40 columns"),
    "hides one from the first of a chunk": (3, lambda: without(causal(3), 0, 0, 0, 5), "hides tokens"),
    "moves scores": (3, lambda: causal(3, torch.float32) - 0.1, "adds numbers"),
    "moves scores of a step": (1, lambda: causal(1, torch.float32) - 0.1, "adds numbers"),
    "hides by a number of its own": (3, lambda: causal(3, torch.float32).clamp(min=-1e4), "adds numbers"),
}


def last_logits(tiny, cache, new, mask):
    ids = prompt(2, HELD + 3)["input_ids"]
    with torch.no_grad():
        tiny(ids[:, :HELD], past_key_values=cache)
        return tiny(ids[:, HELD : HELD + new], attention_mask=mask, past_key_values=cache).logits[:, -1]


@pytest.mark.parametrize("kind", GOES_ON)
def test_a_mask_that_continues_means_the_same_as_to_the_stock_cache(tiny, kind):
    new, mask = GOES_ON[kind]
    output = last_logits(tiny, ekv.ElasticCache.for_model(tiny, 1), new, mask())
    torch.testing.assert_close(
        output, last_logits(tiny, tf.DynamicCache(config=tiny.config), new, mask()), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", REFUSED)
def test_a_contradicting_mask_is_refused_and_the_cache_still_works(tiny, kind):
    new, mask, message = REFUSED[kind]
    cache = ekv.ElasticCache.for_model(tiny, 1)
    with pytest.raises(UsageError, match=message):
        last_logits(tiny, cache, new, mask())
    assert cache.lengths == (HELD, HELD)
    if mask().dim() == 2:
        with torch.no_grad():
            tiny(prompt(2, 1)["input_ids"], past_key_values=cache)


def test_a_mask_that_shows_what_was_padding_is_refused(tiny):
    cache, inputs = ekv.ElasticCache.for_model(tiny, 1), padded([60, 41])
    with torch.no_grad():
        tiny(**inputs, past_key_values=cache)
        with pytest.raises(UsageError, match="shows what was padding"):
            tiny(prompt(2, 1)["input_ids"], attention_mask=ones(2, 61), past_key_values=cache)
        mask = torch.cat([inputs["attention_mask"], ones(2, 1)], 1)
        tiny(prompt(2, 1)["input_ids"], attention_mask=mask, past_key_values=cache)
    assert cache.lengths == (61, 42)


def test_masks_are_compared_with_the_present_positions():
    padding, mask = Padding(), torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    padding.add(2, mask[:, :2].bool().numpy())
    padding.add(2, None)
    assert bool(padding.agrees(mask)) and not bool(padding.agrees(ones(2, 5)))
    padding.gather(torch.tensor([1, 0]).numpy())
    assert bool(padding.agrees(mask.flip(0))) and not bool(padding.agrees(mask))
    padding.remove(3, 2)
    assert bool(padding.agrees(without(mask.flip(0), slice(None), 1)))
    padding.add(1, mask[:, :1].bool().numpy())
    assert bool(padding.agrees(torch.tensor([[1, 0, 1], [0, 1, 1]])))


def test_gradients_through_queries_alone_are_refused():
    frozen = model("llama").requires_grad_(False)
    frozen.model.layers[1].self_attn.q_proj.weight.requires_grad_(True)
    cache = ekv.ElasticCache.for_model(frozen, 1)
    with torch.no_grad():
        frozen(**prompt(1, 40), past_key_values=cache)
    with pytest.raises(UsageError, match="no_grad"):
        frozen(prompt(1, 1)["input_ids"], past_key_values=cache)


def test_dropout_is_refused():
    dropping = model("llama", attention_dropout=0.5).train()
    with torch.no_grad(), pytest.raises(UsageError, match=r"model\.eval\(\)"):
        dropping(**prompt(1, 40), past_key_values=ekv.ElasticCache.for_model(dropping, 1))


def test_a_model_that_has_become_wider_than_its_cache_is_refused():
    changed = model("llama").to(torch.bfloat16)
    cache = ekv.ElasticCache.for_model(changed, 1)
    with torch.no_grad():
        changed(**prompt(1, 40), past_key_values=cache)
        changed.to(torch.float32)
        with pytest.raises(UsageError, match="keeps bf16"):
            changed(prompt(1, 1)["input_ids"], past_key_values=cache)
        cache.reset()
        changed(**prompt(1, 40), past_key_values=cache)
        changed.to(torch.bfloat16)
        changed(prompt(1, 1)["input_ids"], past_key_values=cache)
    assert cache.lengths == (41,)


class Choose(tf.LogitsProcessor):
    """Chooses token 7 at one position only, and some token where no logit is a number."""

    def __init__(self, place):
        self.place = place

    def __call__(self, ids, scores):
        return torch.nan_to_num(scores).index_fill(1, torch.tensor([7]), 1e9 if ids.shape[1] == self.place else -1e9)


@pytest.mark.parametrize("recipe", ["dense", "int4,pages=1/4,anchor_every=4"])
@pytest.mark.parametrize("place", [45, 50])
def test_a_token_that_is_not_finite_is_reported_before_a_generate_ends(recipe, place):
    """The second position is the last that the model receives: its output is the last token of the text."""
    broken = model("llama")
    with torch.no_grad():
        broken.model.embed_tokens.weight[7] = torch.nan
    cache = ekv.ElasticCache.for_model(broken, recipe=recipe)
    with pytest.raises(NonFiniteError, match=rf"layer 0: a value .*sequence 0, KV head 0, position {place}"):
        broken.generate(
            **prompt(1, 40), max_new_tokens=12, do_sample=False, past_key_values=cache, logits_processor=[Choose(place)]
        )


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("prefill", ["stored", "exact"])
@pytest.mark.parametrize(("what", "named"), [("k_proj", "a value"), ("v_proj", "a value"), ("q_proj", "a query")])
def test_what_the_last_layer_makes_of_a_prompt_is_reported(what, named, prefill, count):
    broken = model("llama")
    with torch.no_grad():
        getattr(broken.model.layers[1].self_attn, what).weight[3] = torch.nan
    cache = ekv.ElasticCache.for_model(broken, 4, prefill=prefill)
    with pytest.raises(NonFiniteError, match=rf"layer 1: {named} that is not finite: sequence 0, .*head 0, position 0"):
        broken.generate(**padded([40, 30]), max_new_tokens=count, do_sample=False, past_key_values=cache)
