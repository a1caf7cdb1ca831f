"""Whether what `elastickv eval --engine vllm` measured is what Transformers loses where its attention reads as the engine does.

    python benchmarks/engine_fidelity.py RESULT.json --folder FOLDER [--calibration FILE] [--device cuda] [--output FILE]

The windows of the result are read by the recipes that the engine served, with the engine's rule (`read_rule.py`): prompts read
every page, too, and decodes the pages that they list. What is left between the two is rounding.

Needs: pip install "elastickv[transformers]"; no vLLM.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from command_line import exit_with

RESULTS = Path(__file__).parent / "results"
KIND, VERSION = "elastickv-engine-fidelity", 1
FIGURES = ("kl", "ppl_change_percent", "top1_percent")


def rules_of(recipes: Sequence[str], layers: int, calibration: Any) -> list[Any]:
    """Return the read rule of each layer.

    Parameters
    ----------
    recipes : as a row has them: one for all layers, or one for each.
    calibration : of keys that are rotated; None for none.
    """
    from read_rule import ReadRule

    from elastickv.recipe import Recipe

    parsed = [Recipe.parse(text) for text in (recipes if len(recipes) > 1 else list(recipes) * layers)]
    smoothing = None if calibration is None else calibration.smoothing
    return [
        ReadRule(
            recipe,
            recipe.window,
            anchor_offset=recipe.layer_anchor_offset(layer, layers),
            smoothing=smoothing[layer] if smoothing is not None and recipe.rotates_keys else None,
        )
        for layer, recipe in enumerate(parsed)
    ]


def losses(model: Any, windows: Sequence[Any], scored: int, rules: Sequence[Any]) -> Any:
    """Return the `Fidelity` of reading by rules against full attention, over the last `scored` tokens of windows."""
    import torch
    from read_rule import reading

    from elastickv.evaluation.metrics import Scores, fidelity
    from elastickv.evaluation.prediction_losses import prediction_losses

    figures = []
    with torch.inference_mode():
        for window in windows:
            ids = torch.tensor([window.ids[:-1]], device=model.device)
            full = model(ids, logits_to_keep=scored, use_cache=False).logits[0]
            with reading(model, rules, prompt=len(window.ids) - scored - 1):
                own = model(ids, logits_to_keep=scored, use_cache=False).logits[0]
            figures.append(prediction_losses(full, own, window.ids[-scored:]))
    return fidelity(Scores(*np.stack(figures, 1)))


def compared(result: dict[str, Any], loaded: Any, texts: Sequence[Any], calibration: Any) -> list[dict[str, Any]]:
    """Return a record for each row of a result: the engine's figures, those in Transformers, the difference of the KLs.

    Raises
    ------
    SystemExit : if the result is none of an engine, or was measured on other windows.
    """
    from elastickv.evaluation.texts import windows

    if "engine" not in result:
        raise SystemExit("the result is none of an engine: measure with --engine vllm")
    records = []
    for row in result["rows"]:
        cut = windows(texts, loaded.tokenizer, row["context"], row["windows"])
        first = [each["first"] for each in result["windows"] if each["context"] == row["context"]]
        if first != [window.first for window in cut]:
            raise SystemExit("the result was measured on other windows: give its texts with --text")
        rules = rules_of(row["recipes"], loaded.model.config.num_hidden_layers, calibration)
        own = asdict(losses(loaded.model, cut, result["options"]["scored"], rules))
        records.append(
            {
                **{name: row[name] for name in ("context", "cache", "recipe_hash", "windows", "scored_tokens", "read_ratio")},
                "engine": {name: row[name] for name in FIGURES},
                "transformers": {name: own[name] for name in FIGURES},
                "kl_difference_percent": 100 * (row["kl"]["mean"] / own["kl"]["mean"] - 1),
            }
        )
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path, help="of elastickv eval --engine vllm")
    parser.add_argument("--folder", type=Path, required=True, help="the model's folder, of Transformers")
    parser.add_argument("--calibration", type=Path, help="by which recipes were chosen: keys may be rotated")
    parser.add_argument("--text", type=Path, action="append", default=[], help="that was scored, if not the shipped ones")
    parser.add_argument("--dtype", help="of the model; the result's, if it is not given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/cpu/engine_fidelity-MODEL.json")
    options = parser.parse_args()
    from suite import heading

    from elastickv.evaluation.texts import evaluation_texts, read_text
    from elastickv.recipe import ModelCalibration
    from elastickv.results.files import check_writable
    from elastickv.results.formats import dumps, write_text
    from elastickv.transformers.model_loading import load_model

    output = options.output or RESULTS / "cpu" / f"engine_fidelity-{options.folder.name}.json"
    check_writable(output)
    start, result = time.monotonic(), json.loads(options.result.read_text(encoding="utf-8"))
    dtype = options.dtype or result["model"]["dtype"]
    loaded = load_model(str(options.folder), dtype, options.device)
    texts = [read_text(path) for path in options.text] or evaluation_texts()
    calibration = None if options.calibration is None else ModelCalibration.load(options.calibration)
    rows = compared(result, loaded, texts, calibration)
    record = heading(KIND, VERSION, start)
    record["command"] = ["python", "benchmarks/engine_fidelity.py", options.result.name, "--dtype", dtype]  # no machine's paths
    engine = {name: result["engine"][name] for name in ("name", "version")} | {
        name: result["engine"]["served"][name] for name in ("device", "backend_names", "runner")
    }
    record |= {"model": result["model"], "engine": engine, "dtype": dtype, "device": options.device, "texts": result["texts"]}
    write_text(output, dumps(record | {"calibration": result["calibration"], "rows": rows}))
    for row in rows:
        kls = [row[name]["kl"]["mean"] for name in ("engine", "transformers")]
        print(f"{row['cache']} at {row['context']}: KL {kls[0]:.5f} in the engine, {kls[1]:.5f} in Transformers")
    return 0


if __name__ == "__main__":
    exit_with(main)
