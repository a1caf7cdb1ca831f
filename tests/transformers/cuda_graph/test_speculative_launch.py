"""Speculatively launched decodes, with a recorder that works at once and rolls back from copies."""

import copy
import warnings

import pytest
import torch
import transformers as tf

import elastickv.transformers as ekv
from elastickv.errors import UsageError
from elastickv.transformers.cuda_graph import captured, speculative_launch
from elastickv.transformers.cuda_graph import recorder as recorders
from elastickv.transformers.layer_storage import Backends, LayerStorage
from tests.helpers.captured_decode import FakeRecorder, Swerve
from tests.helpers.model_matrix import model, padded, prompt


class Event:
    def synchronize(self):
        pass


class Seer(FakeRecorder):
    """Runs speculative decodes at once; a rollback restores copies of the caches."""

    launches_speculatively = True

    def __init__(self, stores):
        super().__init__()
        self.stores, self.launched, self.rolled_back = stores, 0, 0
        self.replaying = []

    def record(self, run):
        replay = super().record(run)

        def silent():
            self.replaying.append(True)
            try:
                return replay()
            finally:
                self.replaying.pop()

        return silent

    def new_event(self):
        return Event()

    def wait_for(self, end):
        pass

    def launch_concurrently(self, steps, ends):
        self.launched += 1
        for store in self.stores():
            store.before = copy.deepcopy(store.cache)
        for step in steps:
            step()


@pytest.fixture
def tiny():
    return model("llama")


@pytest.fixture
def seer(monkeypatch):
    caches = []
    made = Seer(lambda: [layer.store for cache in caches for layer in cache.elastic_layers if layer.store])

    def rollback(store):
        made.rolled_back += 1
        store.cache = store.before

    monkeypatch.setattr(LayerStorage, "rollback_step", rollback)
    # A graph's replay runs no Python: nothing notes a use.
    note, silent = Backends.note_use, made.replaying
    monkeypatch.setattr(Backends, "note_use", lambda backends: None if silent else note(backends))
    for module in (captured, recorders):
        monkeypatch.setattr(module, "recorder_for", lambda device: made)
    made.watch = caches.append
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ekv.UncalibratedWarning)
        yield made


def both(tiny, seer, inputs, count=20, compress=4, **options):
    """Return tokens of an eager and a captured generate, and the latter's cache."""
    runs = []
    for capture in (False, True):
        torch.manual_seed(3)
        cache = ekv.ElasticCache.for_model(tiny, compress, capture=capture)
        if capture:
            seer.watch(cache)
        options = {"do_sample": False} | options
        runs.append(tiny.generate(**inputs, max_new_tokens=count, past_key_values=cache, **options))
    return *runs, cache


@pytest.mark.parametrize("compress", [1, 4])
def test_greedy_texts_are_launched_speculatively_and_the_same(tiny, seer, compress):
    eager, tokens, cache = both(tiny, seer, padded([270, 193]), compress=compress)
    assert torch.equal(tokens, eager)
    # 19 decodes: a rehearsal, a recording whose guess is looked at by the next, which launches the first.
    assert seer.launched == 16 and cache.report().ahead == 16, "and none for the token that is not requested"
    assert seer.rolled_back == 0
    assert cache.lengths == (289, 212)


@pytest.mark.parametrize("compress", [1, 4])
def test_a_text_that_swerves_is_taken_back_once_and_left_alone(tiny, seer, compress):
    inputs = prompt(1, 270)
    eager, tokens, cache = both(tiny, seer, inputs, 40, compress, logits_processor=tf.LogitsProcessorList([Swerve(285)]))
    assert torch.equal(tokens, eager)
    assert seer.rolled_back == len(cache.elastic_layers) and 0 < cache.report().ahead < 20
    assert seer.launched == cache.report().ahead + 1
    assert cache.lengths == (270 + 39,)


def test_sampled_texts_are_not_launched_speculatively(tiny, seer):
    eager, tokens, cache = both(tiny, seer, prompt(1, 200), do_sample=True, temperature=5.0)
    assert torch.equal(tokens, eager)
    assert seer.launched == cache.report().ahead == 0


def test_beams_are_not_launched_speculatively(tiny, seer):
    eager, tokens, cache = both(tiny, seer, prompt(1, 200), num_beams=3)
    assert torch.equal(tokens, eager)
    assert cache.report().ahead == 0


def in_flight(tiny, seer, kind=torch.int64):
    """Return a cache with a decode under way, one without that holds the same, and what comes next."""
    inputs, cache = prompt(1, 250), ekv.ElasticCache.for_model(tiny, 4)
    seer.watch(cache)
    other = ekv.ElasticCache.for_model(tiny, 4, capture=False)
    with torch.no_grad():
        for each in (cache, other):
            ids = tiny(**inputs, past_key_values=each).logits[:, -1:].argmax(-1).to(kind)
            for _ in range(6):
                ids = tiny(ids, past_key_values=each).logits.argmax(-1).to(kind)
    return cache, other, ids


def next_logits(tiny, ids, *caches):
    with torch.no_grad():
        return [tiny(ids, past_key_values=each).logits for each in caches]


def test_what_is_interrupted_while_tokens_are_compared_is_taken_back(tiny, seer, monkeypatch):
    cache, other, ids = in_flight(tiny, seer)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(speculative_launch, "_same", interrupt)
        with pytest.raises(KeyboardInterrupt):
            next_logits(tiny, ids, cache)
    assert seer.rolled_back == len(cache.elastic_layers) and cache.backends.in_flight is None
    assert torch.equal(*next_logits(tiny, ids, cache, other))
    assert cache.lengths == other.lengths


def test_a_cache_that_is_cropped_to_nothing_starts_anew(tiny, seer):
    cache, other, _ = in_flight(tiny, seer)
    for each in (cache, other):
        each.crop(-each.get_seq_length())
    assert cache.backends.in_flight is None
    assert torch.equal(*next_logits(tiny, prompt(1, 250)["input_ids"], cache, other))


def test_tokens_of_32_bits_are_not_launched_speculatively(tiny, seer):
    cache, other, ids = in_flight(tiny, seer, torch.int32)
    assert seer.launched == 0
    assert torch.equal(*next_logits(tiny, ids, cache, other))


def test_every_turn_starts_predicting_again(tiny, seer):
    cache, _, _ = in_flight(tiny, seer)
    before = cache.report().ahead
    tiny.generate(prompt(1, 290)["input_ids"], max_new_tokens=20, do_sample=False, past_key_values=cache)
    assert cache.report().ahead > before + 10


def test_a_rehearsal_that_breaks_off_in_the_last_layer_is_refused_after(tiny, seer, monkeypatch):
    cache = ekv.ElasticCache.for_model(tiny, 4)
    ids = next_logits(tiny, prompt(1, 250)["input_ids"], cache)[0][:, -1:].argmax(-1)
    last, own = cache.elastic_layers[-1].store, LayerStorage.enqueue_step

    def fail(store, *rest):
        if store is last:
            raise torch.OutOfMemoryError("no memory")
        return own(store, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(LayerStorage, "enqueue_step", fail)
        with pytest.raises(torch.OutOfMemoryError):
            next_logits(tiny, ids, cache)
    with pytest.raises(UsageError, match="broke off"):
        next_logits(tiny, ids, cache)


@pytest.mark.parametrize("use", ["report", "copy", "crop", "reset"])
def test_every_other_use_of_the_cache_rolls_back_first(tiny, seer, use):
    cache, other, ids = in_flight(tiny, seer)
    assert seer.launched and cache.backends.in_flight is not None, "a loop of one's own tells nothing of its end"
    if use == "reset":
        cache.reset()
        assert cache.backends.in_flight is None and cache.lengths == ()
        return
    if use == "copy":
        cache = copy.deepcopy(cache)
    for each in (cache, other):
        if use == "crop":
            each.crop(-2)
        elif use == "report":
            each.report()
    assert cache.backends.in_flight is None
    assert torch.equal(*next_logits(tiny, ids, cache, other))
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
    assert seer.rolled_back, "the decode after the last token was under way"


def _after(length):
    def stop(input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= length, dtype=torch.bool)

    return stop
