"""What every KV format, selection and recipe loses at equal bytes: one evaluation a model and context.

    python benchmarks/frontier.py MODEL... [--contexts 4096,16384] [--stored-bits 4.25,4.75,8.5] [--device cuda]
        [--output FOLDER] [--time-limit 540]

MODEL is a model folder or a .gguf file. Measured are, in this order, our calibrated recipes at each C of --compress, their
parts (formats alone, selection alone), the formats by layer within --stored-bits, the KV formats and the selections, on the
same windows after the same exact prefill (`elastickv.evaluation.evaluate`). Scored are the texts in data/texts, which no
calibration and no development has read; recipes are calibrated on the text that the package ships.

Our formats are measured twice: through the cache, which rounds a float32 model's keys and values to bfloat16 and needs kernels
for them, and as references in PyTorch, which do neither and run on any device, as `reference:` and the recipe. `--formats
references` measures the latter alone.

Formats have the exact tokens of their publication; with --exact-tokens 4+128 all of them have 4 sinks and a window of 128.

The folder gets frontier-MODEL-CONTEXT.json (with equal exact tokens frontier-MODEL-CONTEXT-4+128.json), a result of the kind
that `elastickv eval` writes, after each row, and calibration-MODEL.json unless it is there. A further call measures what a file
lacks, and published formats again that an earlier version rounded to bfloat16 first. A method that fails is a line of
`skipped`. When the time is over, the row that is being measured is given up and the exit status is 1.
"""

import argparse
import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from command_line import exit_with
from gpu_name import gpu_name

from elastickv.errors import one_line
from elastickv.evaluation.calibrate import DEFAULT_TOKENS, calibrate
from elastickv.evaluation.evaluate import EvaluationOptions, evaluate
from elastickv.evaluation.evaluation_options import REFERENCE
from elastickv.evaluation.exact_tokens import ExactTokens
from elastickv.evaluation.kv_formats.published_formats import PUBLISHED, parse_formats
from elastickv.evaluation.kv_selections.published_selections import parse_selections
from elastickv.evaluation.texts import Text, calibration_text, read_text
from elastickv.recipe import ModelCalibration
from elastickv.results.documents import parse_json
from elastickv.results.files import write_text
from elastickv.results.formats import plain_json
from elastickv.transformers.model_loading import Loaded, fingerprint, load_model
from elastickv.transformers.tokenization import text_prefix, text_tokens
from elastickv.transformers.torch_dtypes import DTYPE_NAMES

FOLDER = Path(__file__).parent
TEXTS = sorted((FOLDER / "data" / "texts").glob("*.txt"))
OWN = (
    "bf16",
    "int8",
    "int8,rotate=kv",
    "int8,rotate=kv,rounding=gptq",
    "fp8",
    "int4",
    "int4,rotate=v",
    "int4,rotate=kv",
    "int4,rounding=gptq",
    "int4,rotate=kv,rounding=gptq",
    "int4,vgroup=32",
    "k=int4,v=int3,rotate=kv",
    "k=int4,v=int3,rotate=kv,rounding=gptq",
    "int3,rotate=kv,rounding=gptq",
    "int2,rotate=kv,rounding=gptq",
    "k=int8,v=int4",
    "k=int8_per_channel,v=int8",
    "k=int8_per_channel,v=int4",
)
REFERENCES = tuple(
    f"{REFERENCE}{recipe}"
    for recipe in (
        "k=int4,v=int3",
        "k=int4,v=int3,rotate=kv",
        "k=int4,v=int3,rotate=kv,rounding=gptq",
        "int3,rotate=kv",
        "int3,rotate=kv,rounding=gptq",
        "int2,rotate=kv,rounding=gptq",
        "int4",
        "int4,rotate=kv",
        "int4,rounding=gptq",
        "int4,rotate=kv,rounding=gptq",
        "k=int8,v=int4,rotate=kv",
        "k=int8_per_channel,v=int4,rotate=v",
        "fp8",
        "int8",
        "int8,rotate=kv",
        "int8,rotate=kv,rounding=gptq",
        "k=int8_per_channel,v=int8",
        "k=int8_per_channel,v=int8,rotate=kv",
    )
)


class Limit:
    """Reports what is being measured, and interrupts it when the time is over."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.now = ""

    def phase(self, name: str) -> None:
        self.now = name
        self.progress(0, 1)

    def progress(self, done: int, total: int) -> None:
        if time.monotonic() > self.end:
            raise KeyboardInterrupt


def short_name(model: str) -> str:
    """Return the part of a model's name that files have: no folder, no suffix and no format of its weights."""
    return re.sub(r"\.(gguf|q\d.*)$", "", Path(model).name.lower().removesuffix(".gguf"))


def window_count(loaded: Loaded, texts: Sequence[Text], context: int, most: int, tokens: int) -> int:
    """Return how many windows texts hold, up to `most` and up to `tokens` in all."""
    own = context - len(text_prefix(loaded.tokenizer))
    held = sum(len(text_tokens(loaded.tokenizer, text.content)) // own for text in texts)
    return min(most, max(1, tokens // context), held)


class Measurement:
    """One model at one context, and the file that has what was measured so far."""

    def __init__(self, loaded: Loaded, texts: Sequence[Text], calibration: ModelCalibration, path: Path) -> None:
        self.loaded, self.texts, self.calibration, self.path = loaded, texts, calibration, path
        self.earlier: dict[str, Any] = {"rows": [], "skipped": [], "seconds": 0.0}
        self.failed: dict[str, str] = {}
        gpu = gpu_name() if loaded.model.device.type == "cuda" else {}
        self.environment = {"gpu": gpu} if gpu else {}
        self.device = {"device_name": gpu["device"]} if gpu else {}
        self.sums = {text.name: hashlib.sha256(text.content.encode()).hexdigest() for text in texts}

    def run(self, options: EvaluationOptions, limit: Limit) -> bool:
        """Measure what the file lacks; return whether the time sufficed."""
        while True:
            self._read(options)
            done = {*self.failed, *(row["cache"] for row in self.earlier["rows"])}
            try:
                result = evaluate(self.loaded, self.texts, options, self.calibration, limit, done, self.note)
            except KeyboardInterrupt:
                return False
            except Exception as error:  # Of one method: the others are measured all the same.
                name, of_method, _ = limit.now.partition(f" at {options.contexts[0]} tokens")
                if not of_method or name in self.failed:
                    raise
                self.failed[name] = one_line(f"{name} failed: {type(error).__name__}: {error}")[:200]
                print(self.failed[name], flush=True)
                torch.cuda.empty_cache()
                continue
            if result["rows"] or self.failed:
                self._write(result)
            return bool(result["complete"])

    def note(self, result: dict[str, Any]) -> None:
        """Write what is measured so far, and print the latest row."""
        self._write(result)
        row = result["rows"][-1]
        kl = "KL {mean:.6f} [{low:.6f}, {high:.6f}]".format(**row["kl"])
        top = f"top-1 {row['top1_percent']['mean']:.2f} %"
        print(f"{row['context']} {row['cache']}: {kl}, {top}  ({row['seconds']:.1f} s)", flush=True)

    def _write(self, result: dict[str, Any]) -> None:
        described = result | {
            "environment": result["environment"] | self.environment,
            "model": result["model"] | self.device,
            "options": result["options"] | {"texts_sha256": self.sums},
            "rows": [*self.earlier["rows"], *result["rows"]],
            "skipped": [*dict.fromkeys([*self.earlier["skipped"], *result["skipped"], *self.failed.values()])],
            "seconds": self.earlier["seconds"] + result["seconds"],
        }
        write_text(self.path, plain_json.dumps(described))

    def _read(self, options: EvaluationOptions) -> None:
        """Take over the rows of the file, if it was measured in the same way."""
        if not self.path.exists():
            return
        earlier = parse_json(self.path.read_text(encoding="utf-8"))
        model, versions = earlier["model"], earlier["environment"]
        here = {
            "contexts": [*options.contexts],
            "window_count": options.window_count,
            "scored": options.scored,
            "exact_tokens": options.exact_tokens and asdict(options.exact_tokens),
            "texts_sha256": self.sums,
        }
        same = (
            {name: earlier["options"].get(name) for name in here} == here
            and model["fingerprint"] == fingerprint(self.loaded.model)
            and model["dtype"] == DTYPE_NAMES[self.loaded.model.dtype]
            and model.get("device_name") == self.device.get("device_name")
            and earlier["calibration"] == {"text": self.calibration.text, "tokens": self.calibration.tokens}
            and all(versions[name] == version(name) for name in ("torch", "transformers"))
        )
        if same:
            again = [row for row in earlier["rows"] if row["cache"] in options.formats and rounded_first(row, model["dtype"])]
            self.earlier = earlier | {"rows": [row for row in earlier["rows"] if row not in again]}
            if again:
                names = ", ".join(row["cache"] for row in again)
                print(f"{self.path.name}: measured anew without a rounding to bfloat16 before: {names}", flush=True)
        else:
            print(f"{self.path.name} was measured in another way: it is measured anew", flush=True)


def rounded_first(row: dict[str, Any], dtype: str) -> bool:
    """Return whether an earlier version measured a published format after it had rounded keys and values to bfloat16."""
    return dtype == "fp32" and row["cache"] in PUBLISHED and "exact_dtype" not in row["stored_format"]


def calibrated(loaded: Loaded, path: Path, limit: Limit) -> ModelCalibration:
    """Return the calibration in a file, which is made unless it is there."""
    if not path.exists():
        began = time.monotonic()
        write_text(path, calibrate(loaded, calibration_text(), DEFAULT_TOKENS, limit.progress).dumps())
        print(f"{path.name}: calibrated in {time.monotonic() - began:.0f} s", flush=True)
    return ModelCalibration.load(path)


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(",") if text != "none")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--contexts", type=numbers, default=(4096.0,), help="tokens of a window  [default: 4096]")
    parser.add_argument("--compress", type=numbers, default=(2.0, 4.0, 8.0, 16.0), help="values of C  [default: 2,4,8,16]")
    parser.add_argument("--parts", type=numbers, default=(4.0, 8.0, 16.0), help="values of C that are measured in parts too")
    parser.add_argument(
        "--stored-bits", type=numbers, default=(), help="bits an element for which a calibration chooses formats by layer"
    )
    parser.add_argument("--formats", action="append", help="as for elastickv eval, references or none  [default: everything]")
    parser.add_argument("--exact-tokens", default="own", help="sinks and window of all formats, as in 4+128  [default: own]")
    parser.add_argument("--selections", default="all", help="names with commas between, or none  [default: all]")
    parser.add_argument("--windows", type=int, default=32, help="most windows of a context  [default: 32]")
    parser.add_argument("--tokens", type=int, default=8 * 28672, help="most tokens in all windows of a context")
    parser.add_argument("--scored", type=int, default=128, help="last tokens of a window that are scored  [default: 128]")
    parser.add_argument(
        "--text", type=Path, action="append", dest="texts", help="text to score  [default: those of data/texts]"
    )
    parser.add_argument("--output", type=Path, default=FOLDER / "results" / "cpu", help="folder of the result files")
    parser.add_argument("--calibrations", type=Path, help="folder of the calibrations  [default: as --output]")
    parser.add_argument("--dtype", default="fp32", help="fp32, bf16 or fp16  [default: fp32, whose rounding hides no loss]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--time-limit", type=float, default=86400.0, help="seconds after which measuring ends")
    return parser.parse_args()


def main() -> int:
    arguments = parsed()
    limit, complete = Limit(arguments.time_limit), True
    lists = {"none": (), "references": REFERENCES}
    named = arguments.formats or ("all", *OWN, *REFERENCES)
    formats = parse_formats([text for each in named for text in lists.get(each, (each,))])
    exact = ExactTokens.parse(arguments.exact_tokens)
    suffix = "" if exact is None else f"-{arguments.exact_tokens}"
    selections = parse_selections(None if arguments.selections == "none" else arguments.selections)
    texts = [read_text(path) for path in arguments.texts or TEXTS]
    try:
        for model in arguments.models:
            began = time.monotonic()
            loaded = load_model(model, arguments.dtype, arguments.device)
            arguments.output.mkdir(parents=True, exist_ok=True)
            print(f"{loaded.name}: loaded in {time.monotonic() - began:.0f} s", flush=True)
            name = short_name(model)
            path = (arguments.calibrations or arguments.output) / f"calibration-{name}.json"
            calibration = calibrated(loaded, path, limit)
            if arguments.stored_bits and calibration.sensitivity is None:
                print(f"{path.name} has no sensitivities of layers: remove it and calibrate again in fp32", flush=True)
            for context in map(int, arguments.contexts):
                count = window_count(loaded, texts, context, arguments.windows, arguments.tokens)
                options = EvaluationOptions(
                    ratios=arguments.compress, contexts=(context,), window_count=count, scored=arguments.scored,
                    needle_lengths=(), greedy_tokens=0, formats=formats, exact_tokens=exact, selections=selections,
                    parts=arguments.parts, stored_bits=arguments.stored_bits,
                )  # fmt: skip
                measurement = Measurement(
                    loaded, texts, calibration, arguments.output / f"frontier-{name}-{context}{suffix}.json"
                )
                complete = measurement.run(options, limit) and complete
            del loaded
    except KeyboardInterrupt:
        complete = False
    print("complete" if complete else "not complete: call it again to measure the rest", flush=True)
    return 0 if complete else 1


if __name__ == "__main__":
    exit_with(main)
