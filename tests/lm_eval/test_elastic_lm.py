"""The adapter for lm-evaluation-harness: with the harness where it is installed, else with the parts that it builds on."""

import subprocess
import sys
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from elastickv.errors import UsageError
from tests.helpers import fake_harness
from tests.helpers.tiny_models import tiny_gguf

ROOT = Path(__file__).parents[2]
HOME = "elastickv.lm_eval.elastic_lm"
REAL = find_spec("lm_eval") is not None
CONTEXT = [5 + i * i % 250 for i in range(700)]


@pytest.fixture(scope="module")
def adapter():
    with pytest.MonkeyPatch.context() as patch:
        if not REAL:
            fake_harness.install(patch)
        yield import_module(HOME)
        sys.modules.pop(HOME)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf"))


@pytest.fixture(scope="module")
def exact(adapter, tiny):
    return adapter.ElasticLM(tiny, compress=1, device="cpu")


def expected(model, context, continuation):
    ids = torch.tensor([[*context, *continuation]])
    with torch.inference_mode():
        predicted = model(input_ids=ids).logits[0, len(context) - 1 : -1].float().log_softmax(-1)
    return sum(float(row[token]) for row, token in zip(predicted, continuation, strict=True)), predicted.argmax(-1).tolist()


def test_it_is_registered_under_its_name(adapter):
    if not REAL:
        assert fake_harness.REGISTERED["elastickv"] is adapter.ElasticLM
    else:
        from lm_eval.api.registry import get_model

        assert get_model("elastickv") is adapter.ElasticLM


def test_the_harness_finds_it_as_an_entry_point_of_the_package(adapter):
    """The harness after 0.4.13 looks for models of other packages in this group."""
    (entry,) = entry_points(group="lm_eval.models", name="elastickv")
    assert entry.load() is adapter.ElasticLM


def test_without_compression_log_likelihoods_are_the_models_own(exact):
    _, likely = expected(exact.model, CONTEXT[:40], [7, 9])
    requests = [
        (("a", "b"), CONTEXT[:40], [7, 9, 11]),
        (None, CONTEXT[:1], [8, 8]),
        (("a", "c"), CONTEXT[:40], [12]),
        (("a", "d"), CONTEXT[:40], [likely[0]]),
    ]
    answers = exact._loglikelihood_tokens(requests, disable_tqdm=True)
    for (_, context, continuation), (total, _) in zip(requests, answers, strict=True):
        assert total == pytest.approx(expected(exact.model, context, continuation)[0], abs=1e-3)
    assert [greedy for _, greedy in answers] == [False, False, False, True]


@pytest.mark.parametrize("name", ["calibraton", "parallelize"])
def test_an_unknown_argument_is_named_with_those_that_there_are(adapter, tiny, name):
    with pytest.raises(UsageError, match=f"^{name}: no such argument of the model; give pretrained, compress, .*max_length"):
        adapter.ElasticLM(tiny, compress=2, device="cpu", **{name: "x"})


def test_a_request_that_is_too_long_loses_its_beginning(adapter, tiny):
    short = adapter.ElasticLM(tiny, compress=1, device="cpu", max_length=32)
    ((total, _),) = short._loglikelihood_tokens([(None, CONTEXT[:100], [7, 9])], disable_tqdm=True)
    assert total == pytest.approx(expected(short.model, CONTEXT[69:100], [7, 9])[0], abs=1e-3)


def test_continuations_are_read_through_the_compressed_cache(adapter, tiny, exact):
    four = adapter.ElasticLM(tiny, compress=4, device="cpu")
    requests = [(None, CONTEXT, [7, 9, 11, 13]), (None, CONTEXT, [7, 9, 11, 13])]
    (first, _), (again, _) = four._loglikelihood_tokens(requests, disable_tqdm=True)
    own = expected(exact.model, CONTEXT, [7, 9, 11, 13])[0]
    assert first == again, "each continuation has a cache of its own"
    assert 1e-4 < abs(first - own) < abs(own) / 2


def test_generation_uses_an_elastic_cache_and_leaves_the_model_as_it_was(adapter, tiny, exact, monkeypatch):
    made = []
    original = adapter.ElasticCache.for_model.__func__

    def counted(cls, *arguments, **options):
        made.append(arguments[1:] or options)
        return original(cls, *arguments, **options)

    monkeypatch.setattr(adapter.ElasticCache, "for_model", classmethod(counted))
    ids = torch.tensor([CONTEXT[:50]])
    generated = exact._model_generate(ids, 60, [], attention_mask=torch.ones_like(ids), do_sample=False)
    assert made == [(1,)] or made == [{"compress": 1}]
    assert generated.shape == (1, 60) and generated[0, 50] == expected(exact.model, CONTEXT[:50], [0])[1][0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "`compress` is missing"),
        ({"compress": 0.5}, "compress"),
        ({"compress": 4, "dtype": "int8"}, "choose fp32"),
        ({"recipe": "int5"}, "int5"),
        ({"compress": 4, "calibration": "/no/such/file"}, "/no/such/file"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_evaluated(adapter, tiny, arguments, named):
    with pytest.raises(UsageError, match=named):
        adapter.ElasticLM(tiny, device="cpu", **arguments)


def test_without_the_harness_the_command_says_what_to_install(tmp_path):
    program = (
        "import importlib.util, runpy, sys\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'lm_eval' else found(name, *rest)\n"
        "runpy.run_module('elastickv.lm_eval', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT / "src", check=False)
    assert done.returncode == 2 and done.stderr == "error: lm_eval is not installed: pip install lm_eval\n"


def test_stored_bits_are_a_budget_of_their_own_that_needs_a_calibration(adapter, tiny):
    with pytest.raises(UsageError, match=r"`stored_bits`=4\.75 needs a calibration"):
        adapter.ElasticLM(tiny, stored_bits=4.75, device="cpu")
