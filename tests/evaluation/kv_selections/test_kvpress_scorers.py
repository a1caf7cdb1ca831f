"""Scorers of kvpress: a package of the same interface stands in for it; where kvpress is installed, itself too."""

import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from elastickv.errors import UsageError
from elastickv.evaluation.kv_selections.kvpress_scorers import KvpressScorer
from elastickv.evaluation.kv_selections.prompt_observation import prompt_scores
from elastickv.evaluation.prefill import prefill
from tests.helpers.tiny_models import tiny_llama

ROWS = [list(range(60)), list(range(40, 100))]


@dataclass
class ScorerPress:
    compression_ratio: float = 0.0

    def post_init_from_model(self, model):
        pass

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        raise NotImplementedError

    def compress(self):
        pass


class KnormPress(ScorerPress):
    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        assert hidden_states.shape[:2] == keys.shape[::2] == values.shape[::2] and attentions is None
        assert kwargs["position_embeddings"][0].shape[-2] == keys.shape[2] and module.rotary_emb is not None
        return -keys.norm(dim=-1)


class KeptPress(ScorerPress):
    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return torch.full(keys.shape[:3], float(int(keys.shape[2] * (1 - self.compression_ratio))))


class ObservedAttentionPress(ScorerPress):
    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        assert attentions.shape[1] == module.config.num_attention_heads
        return attentions.sum(2).view(1, keys.shape[1], -1, keys.shape[2]).mean(2)


class FussyPress(ScorerPress):
    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        raise AssertionError("only on Tuesdays\nor so")


class FlatPress(ScorerPress):
    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return keys[..., 0, 0]


class MergingPress(ScorerPress):
    score = KnormPress.score

    def compress(self):
        return "otherwise"


@pytest.fixture
def kvpress(monkeypatch):
    module = ModuleType("kvpress")
    module.__spec__ = ModuleSpec("kvpress", None)
    for kind in (ScorerPress, KnormPress, KeptPress, ObservedAttentionPress, FussyPress, FlatPress, MergingPress):
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "kvpress", module)
    return module


@pytest.fixture(scope="module")
def model():
    return tiny_llama().model


@pytest.fixture(scope="module")
def start(model):
    return prefill(model, ROWS, 50, 5)


def scores(model, start, name, size=20):
    scorer = KvpressScorer(name)
    scorer.prepare(model)
    return prompt_scores(model, start, lambda prompt: scorer.prompt_scores(size, prompt))


def test_a_press_scores_the_keys_of_each_layer_and_the_best_stay(kvpress, model, start):
    by_layer = scores(model, start, "KnormPress")
    assert list(by_layer) == [0, 1] and not hasattr(model.model.layers[0].self_attn, "rotary_emb")
    for number, of_layer in by_layer.items():
        torch.testing.assert_close(of_layer, -start.keys[number].norm(dim=-1))
    keys = torch.zeros(2, 1, 53, 64)
    chosen = KvpressScorer("KnormPress").layer(20, by_layer[0]).select(keys[:, :, :1], keys)
    smallest = start.keys[0].norm(dim=-1).argsort(-1)[..., :20].sort(-1).values
    assert chosen[:, :, 50:].all() and torch.equal(chosen[..., :50].nonzero()[:, 2].view(2, 1, 20), smallest)


def test_the_ratio_of_a_press_leaves_as_many_tokens_as_are_read(kvpress, model, start):
    for size in (1, 7, 20, 49, 50):
        assert (scores(model, start, "KeptPress", size)[0] == size).all()


def test_the_press_that_needs_attention_gets_that_of_the_prompt(kvpress, model, start):
    of_layer = scores(model, start, "ObservedAttentionPress")[0]
    torch.testing.assert_close(of_layer.sum(-1), torch.full((2, 1), 50.0))


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("KnormsPress", "selection kvpress:KnormsPress is no scorer of kvpress: choose .*kvpress:KnormPress"),
        ("MergingPress", "selection kvpress:MergingPress is no scorer of kvpress"),
        ("ScorerPress", "selection kvpress:ScorerPress is no scorer of kvpress"),
        ("FussyPress", r"cannot score 256 tokens of LlamaAttention \(AssertionError: only on Tuesdays\): leave it out$"),
        ("FlatPress", r"returns scores of shape \(1, 1\), not \(1, 1, 256\): leave it out$"),
    ],
)
def test_what_cannot_score_is_refused_before_anything_is_measured(kvpress, model, name, named):
    with pytest.raises(UsageError, match=named) as error:
        KvpressScorer(name).prepare(model)
    assert "\n" not in str(error.value) and not hasattr(model.model.layers[0].self_attn, "rotary_emb")


def test_without_kvpress_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("elastickv.evaluation.kv_selections.kvpress_scorers.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"^selection kvpress:KnormPress needs kvpress: pip install .*kvpress"):
        KvpressScorer("KnormPress")


@pytest.fixture
def importing(monkeypatch, tmp_path):
    """Return a function that makes a module's text what `import kvpress` runs."""

    def write(text):
        (tmp_path / "kvpress.py").write_text(text, encoding="utf-8")
        # So that what is imported does not outlive the test.
        monkeypatch.setitem(sys.modules, "kvpress", None)
        del sys.modules["kvpress"]
        monkeypatch.syspath_prepend(tmp_path)

    return write


def test_a_kvpress_that_cannot_be_imported_is_one_line(importing):
    importing("import no_such_package_of_kvpress\n")
    with pytest.raises(UsageError, match=r"kvpress cannot be imported \(ModuleNotFoundError: .*no_such_package_of_kvpress"):
        KvpressScorer("KnormPress")


def test_importing_kvpress_leaves_the_attention_functions_as_they_were(importing):
    importing(
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions\n"
        "class ScorerPress:\n    score = compress = None\n"
        "for name, function in list(functions.items()): functions[name] = lambda *args: None\n"
    )
    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    with pytest.raises(UsageError, match="is no scorer of kvpress"):
        KvpressScorer("KnormPress")
    assert dict(ALL_ATTENTION_FUNCTIONS.items()) == before


@pytest.mark.skipif(find_spec("kvpress") is None, reason="kvpress is not installed")
@pytest.mark.parametrize("name", ["KnormPress", "SnapKVPress", "ExpectedAttentionPress", "ObservedAttentionPress"])
def test_kvpress_itself_scores_a_prompt(name, model):
    begun = prefill(model, [[token % 100 for token in range(300)]], 200, 5)
    of_layer = scores(model, begun, name)[1]
    assert of_layer.shape == (1, 1, 200) and of_layer.isfinite().all()
