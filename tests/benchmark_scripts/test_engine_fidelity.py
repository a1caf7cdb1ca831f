"""The comparison of a result through vLLM with Transformers by the engine's rule, on a result that was made by that rule."""

import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from elastickv.evaluation.texts import Text, windows
from tests.helpers.tiny_models import TEXT, tiny_llama

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TEXTS, CONTEXT, SCORED = [Text("letters", TEXT)], 300, 40
RECIPES = ["int4,pages=1/2,anchor_every=2,sinks=0,window=64", "int8,sinks=0,window=64"]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("engine_fidelity")
    for name in ("engine_fidelity", "read_rule", "suite", "gpu_name"):
        sys.modules.pop(name, None)


@pytest.fixture
def loaded():
    return tiny_llama()


def result(script, loaded, recipes, **changes):
    """Return a result as `elastickv eval --engine vllm` writes it."""
    cut = windows(TEXTS, loaded.tokenizer, CONTEXT, 2)
    layers = script.rules_of(recipes, 2, None)
    row = {"context": CONTEXT, "cache": "C=2", "recipe_hash": "0", "recipes": recipes, "windows": 2, "scored_tokens": 80}
    row |= {"read_ratio": 2.0} | asdict(script.losses(loaded.model, cut, SCORED, layers))
    first = [{"context": CONTEXT, "first": window.first} for window in cut]
    served = {"device": "CPU", "backend_names": ["ELASTICKV"], "runner": "runner"}
    model = {"name": "tiny", "dtype": "fp32"}
    whole = {"engine": {"name": "vllm", "version": "0.32.0", "served": served}, "rows": [row], "windows": first}
    whole |= {"options": {"scored": SCORED}, "model": model, "texts": ["letters"], "calibration": None}
    return json.loads(json.dumps(whole | changes))


def test_a_result_by_the_rule_agrees_and_one_by_another_rule_does_not(script, loaded):
    own = result(script, loaded, RECIPES)
    record = script.compared(own, loaded, TEXTS, None)[0]
    assert record["kl_difference_percent"] == 0 and record["engine"] == record["transformers"]
    assert record["engine"]["kl"]["mean"] > 0
    own["rows"][0]["recipes"] = ["int4,sinks=0,window=64"]
    assert abs(script.compared(own, loaded, TEXTS, None)[0]["kl_difference_percent"]) > 1


def test_a_selection_leaves_prompts_alone(script, loaded):
    """The model is exact up to the prompt's end, so that the first scored step differs, and not what comes before it."""
    import torch

    ids = torch.tensor([windows(TEXTS, loaded.tokenizer, CONTEXT, 1)[0].ids[:-1]])
    logits = []
    for recipe in ("int4,pages=1/8,sinks=0,window=64", "int4,sinks=0,window=64"):
        with (
            torch.inference_mode(),
            importlib.import_module("read_rule").reading(loaded.model, script.rules_of([recipe], 2, None), prompt=200),
        ):
            logits.append(loaded.model(ids).logits[0])
    assert logits[0][:200].equal(logits[1][:200]) and not logits[0][200].equal(logits[1][200])


def test_a_result_of_transformers_or_of_other_windows_is_refused(script, loaded):
    own = result(script, loaded, RECIPES)
    with pytest.raises(SystemExit, match="other windows: give its texts"):
        script.compared(own | {"windows": []}, loaded, TEXTS, None)
    del own["engine"]
    with pytest.raises(SystemExit, match="measure with --engine vllm"):
        script.compared(own, loaded, TEXTS, None)


def test_the_script_writes_what_it_compared(script, loaded, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("elastickv.transformers.model_loading.load_model", lambda *arguments: loaded)
    monkeypatch.setattr("elastickv.evaluation.texts.evaluation_texts", lambda: TEXTS)
    source, output = tmp_path / "result.json", tmp_path / "compared.json"
    source.write_text(json.dumps(result(script, loaded, RECIPES)), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["engine_fidelity.py", str(source), "--folder=tiny", f"--output={output}"])
    assert script.main() == 0
    record = json.loads(output.read_text(encoding="utf-8"))
    assert record["rows"][0]["kl_difference_percent"] == 0 and record["engine"]["version"] == "0.32.0"
    assert str(tmp_path) not in output.read_text(encoding="utf-8") and "C=2 at 300: KL" in capsys.readouterr().out
