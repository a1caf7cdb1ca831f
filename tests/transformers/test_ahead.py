"""Decodes launched ahead, with a recorder whose work is done at once and undone from copies."""

import copy
import warnings

import pytest
import torch
import transformers as tf

import elastickv.transformers as ekv
from elastickv.transformers import captured
from elastickv.transformers import recorder as recorders
from elastickv.transformers.store import HostStore
from tests.helpers.model_matrix import model, padded, prompt
from tests.transformers.test_captured import Recorder


class Event:
    def wait(self):
        pass

    def synchronize(self):
        pass


class Seer(Recorder):
    """What is launched ahead is done at once; who takes it back gets the caches of before."""

    looks_ahead = True

    def __init__(self, stores):
        super().__init__()
        self.stores, self.launched, self.taken_back = stores, 0, 0

    def beside(self, run):
        self.launched += 1
        for store in self.stores():
            store.before = copy.deepcopy(store.cache)
        return run(), Event()


@pytest.fixture
def tiny():
    return model("llama")


@pytest.fixture
def seer(monkeypatch):
    caches = []
    made = Seer(lambda: [layer.store for cache in caches for layer in cache.elastic_layers if layer.store])

    def take_back(store):
        made.taken_back += 1
        store.cache = store.before

    monkeypatch.setattr(HostStore, "take_back", take_back, raising=False)
    for module in (captured, recorders):
        monkeypatch.setattr(module, "recorder_for", lambda device: made)
    made.watch = caches.append
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ekv.UncalibratedWarning)
        yield made


class Swerve(tf.LogitsProcessor):
    """From a place on, forbids the likeliest token at every third."""

    def __init__(self, start):
        self.start = start

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] >= self.start and input_ids.shape[1] % 3 == 0:
            scores = scores.scatter(1, scores.argmax(-1, keepdim=True), -float("inf"))
        return scores


def both(tiny, seer, inputs, count=20, compress=4, **options):
    """Return tokens of an eager and a captured generate, and the latter's cache."""
    found = []
    for capture in (False, True):
        torch.manual_seed(3)
        cache = ekv.ElasticCache.for_model(tiny, compress, capture=capture)
        if capture:
            seer.watch(cache)
        options = {"do_sample": False} | options
        found.append(tiny.generate(**inputs, max_new_tokens=count, past_key_values=cache, **options))
    return *found, cache


@pytest.mark.parametrize("compress", [1, 4])
def test_greedy_texts_are_launched_ahead_and_the_same(tiny, seer, compress):
    eager, found, cache = both(tiny, seer, padded([270, 193]), compress=compress)
    assert torch.equal(found, eager)
    # 19 decodes: a rehearsal, a recording whose guess is looked at by the next, which launches the first.
    assert seer.launched == 16 and cache.report().ahead == 16, "and none for the token that is not asked for"
    assert seer.taken_back == 0
    assert cache.lengths == (289, 212)


@pytest.mark.parametrize("compress", [1, 4])
def test_a_text_that_swerves_is_taken_back_once_and_left_alone(tiny, seer, compress):
    inputs = prompt(1, 270)
    eager, found, cache = both(tiny, seer, inputs, 40, compress, logits_processor=tf.LogitsProcessorList([Swerve(285)]))
    assert torch.equal(found, eager)
    assert seer.taken_back == len(cache.elastic_layers) and 0 < cache.report().ahead < 20
    assert seer.launched == cache.report().ahead + 1
    assert cache.lengths == (270 + 39,)


def test_sampled_texts_are_not_launched_ahead(tiny, seer):
    eager, found, cache = both(tiny, seer, prompt(1, 200), do_sample=True, temperature=5.0)
    assert torch.equal(found, eager)
    assert seer.launched == cache.report().ahead == 0


def test_beams_are_not_launched_ahead(tiny, seer):
    eager, found, cache = both(tiny, seer, prompt(1, 200), num_beams=3)
    assert torch.equal(found, eager)
    assert cache.report().ahead == 0


@pytest.mark.parametrize("use", ["report", "copy", "crop", "reset"])
def test_whoever_uses_the_cache_finds_what_was_asked_for(tiny, seer, use):
    inputs, cache = prompt(1, 250), ekv.ElasticCache.for_model(tiny, 4)
    seer.watch(cache)
    other = ekv.ElasticCache.for_model(tiny, 4, capture=False)
    with torch.no_grad():
        for each in (cache, other):
            ids = tiny(**inputs, past_key_values=each).logits[:, -1:].argmax(-1)
            for _ in range(6):
                ids = tiny(ids, past_key_values=each).logits.argmax(-1)
    assert seer.launched and cache.backends.ahead is not None, "a loop of one's own tells nothing of its end"
    if use == "reset":
        cache.reset()
        assert cache.backends.ahead is None and cache.lengths == ()
        return
    if use == "copy":
        cache = copy.deepcopy(cache)
    for each in (cache, other):
        if use == "crop":
            each.crop(-2)
        elif use == "report":
            each.report()
    assert cache.backends.ahead is None
    with torch.no_grad():
        found, expected = (tiny(ids, past_key_values=each).logits for each in (cache, other))
    assert torch.equal(found, expected)
    assert cache.lengths == other.lengths


def test_a_turn_after_a_text_that_ended_early(tiny, seer):
    inputs, ended = prompt(1, 200), []
    for capture in (False, True):
        cache = ekv.ElasticCache.for_model(tiny, 2, capture=capture)
        if capture:
            seer.watch(cache)
        first = tiny.generate(
            **inputs, max_new_tokens=30, do_sample=False, past_key_values=cache, stopping_criteria=[_after(212)]
        )
        longer = torch.cat([first, inputs["input_ids"][:, :9]], dim=1)
        ended.append(tiny.generate(longer, max_new_tokens=12, do_sample=False, past_key_values=cache))
    assert torch.equal(*ended)
    assert seer.taken_back, "the decode after the last token was under way"


def _after(length):
    def stop(input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= length, dtype=torch.bool)

    return stop
