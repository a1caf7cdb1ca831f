"""What evaluations of a tiny model through an engine are compared with: Transformers, by the engine's rule."""

import importlib
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from elastickv.evaluation.evaluation_options import EvaluationOptions
from elastickv.evaluation.texts import Text, windows

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LAYERS, WINDOW, CONTEXT, SCORED = 2, 64, 400, 96
OPTIONS = EvaluationOptions(
    ratios=(1.0, 3.0),
    formats=("int4",),
    contexts=(CONTEXT,),
    window_count=2,
    scored=SCORED,
    needle_lengths=(),
    greedy_tokens=8,
)


def random_texts():
    """Return two texts of words that the tiny model's tokenizer has."""
    rng = np.random.default_rng(5)
    return [Text(f"{name}.txt", " ".join(f"w{word}" for word in rng.integers(0, 500, 900))) for name in "ab"]


@contextmanager
def losses_in_transformers(folder, texts):
    """Return a function of a row, of what changes its layers' rules, and of the model's dtype: what is lost in Transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cut = windows(texts, AutoTokenizer.from_pretrained(folder), CONTEXT, OPTIONS.window_count)
    models = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        script = importlib.import_module("engine_fidelity")

        def losses(row, changed=lambda layer, rule: rule, dtype=torch.float64):
            if dtype not in models:
                models[dtype] = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            rules = [changed(layer, rule) for layer, rule in enumerate(script.rules_of(row["recipes"], LAYERS, None))]
            return script.losses(models[dtype], cut, SCORED, rules)

        yield losses
    for name in ("engine_fidelity", "read_rule"):
        sys.modules.pop(name, None)


def difference(kl, of):
    """Return by which part two KLs differ."""
    return abs(kl / of - 1)
