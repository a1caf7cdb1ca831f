"""Which way to quantize keys and values loses least at given bits: KL against the exact cache, with candidates for new formats.

    python benchmarks/format_study.py MODEL [--device cuda] [--output FILE] [--time-limit 540] [--variant NAME ...]

MODEL is a model folder or a .gguf file whose every layer attends to the whole context. Windows of the texts that the package
ships to be scored are read exactly; then the keys and values of the middle tokens (all but 4 sinks and the newest 128) are
replaced by what a variant stores, and the last tokens are predicted once more, in float32. Nothing is timed: this says what a
format is worth before kernels are written for it.

A variant is named by its words (`format_study_codecs.py`): `k4/32 hadamard hessian` are keys in 4 bits, a scale for a channel
of 32 tokens, rotated, rounded with regard to the queries; with ` + `, keys and values together. Measured are, in this order,
pairs, formats chosen by layer (by query-weighted error, which needs no forward pass), mixes of formats by layer and tensor that
are cheapest at given mean bits (by the KL of each layer's format alone, on the calibration text), and single tensors. With
--variant only the named ones, and mixes only with --mixes.

The file, `results/cpu/format_study-MODEL.json` by default, is written after every row. When the time is over, the exit status
is 1. Needs: pip install "elastickv[transformers]".
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from command_line import exit_with
from format_study_codecs import ACCEPTED, Statistics, Tensor, Variant, quantized
from format_study_windows import Windows, statistics_of
from frontier import short_name
from suite import heading

from elastickv.errors import UsageError
from elastickv.evaluation.texts import calibration_text, evaluation_texts
from elastickv.recipe.formats import PAGE_TOKENS
from elastickv.recipe.recipe import DEFAULT_SINKS, DEFAULT_WINDOW
from elastickv.results.files import check_writable, write_text
from elastickv.results.formats import plain_json
from elastickv.transformers.model_loading import Loaded, fingerprint, load_model

KIND, VERSION = "elastickv-format-study", 1
RESULTS = Path(__file__).parent / "results" / "cpu"
TRANSFORMS = ("", " hadamard", " smooth", " balanced")
ROUNDINGS = ("", " hessian")
SMALL_SCALES = " hadamard hessian log8 zero8"  # of values
PAIRS = (
    "k4/32 + v4",
    *(f"k4/32{t}{r} + v4 hadamard{r}" for r in ROUNDINGS for t in TRANSFORMS),
    "k4/32 balanced hessian + v4 balanced hessian",
    *(f"k4/64{t} hessian + v4 hadamard hessian" for t in TRANSFORMS),
    *(f"k{bits}/64{t} hessian log8 + v4{SMALL_SCALES}" for bits in (3, 4, 5) for t in TRANSFORMS),
    *(f"k{bits}/32{t} hessian + v3{SMALL_SCALES}" for bits in (3, 4) for t in TRANSFORMS),
    *(f"k8/{page}{t} + v8 symmetric" for page in (32, 64, 128) for t in ("", " balanced hessian")),
    "k8/32 + v4 hadamard",
)
SINGLE = (
    *(f"k4/{page}{t}{r}{s}" for s in ("", " log8") for page in (32, 64, 128) for r in ROUNDINGS for t in TRANSFORMS),
    *(f"v4{t}{r}" for r in ROUNDINGS for t in TRANSFORMS),
    *(f"v{bits}{SMALL_SCALES}" for bits in range(2, 9)),
    *(f"v{bits}{t}{r}" for bits in (3, 2, 5, 6, 7, 8) for r in ROUNDINGS for t in TRANSFORMS),
    *(f"k{bits}/64{t}{r}" for bits in (3, 2, 5, 6, 7, 8) for r in ROUNDINGS for t in TRANSFORMS),
)
# One of a line is chosen for each layer, by weighted error.
CHOICES = tuple(
    tuple(f"k4/{page}{t}{end}" for t in transforms)
    for page, end in ((32, ""), (32, " hessian"), (64, " hessian log8"))
    for transforms in (("", " hadamard"), ("", " hadamard", " balanced"))
)
MIXED = (
    *(f"k4/32{end}" for end in ("", " hadamard", " hessian", " hadamard hessian", " balanced hessian")),
    *(f"k{bits}/64{t} hessian log8" for bits in (3, 4, 5) for t in ("", " hadamard", " balanced")),
    "k6/64 hessian log8",
    "k8/64",
    "v4 hadamard hessian",
    *(f"v{bits}{SMALL_SCALES}" for bits in (2, 3, 4, 5)),
    "v8 symmetric",
)
BUDGETS = (4.25, 4.5, 4.75, 5.0, 4.0, 3.75, 3.5)


class Study:
    """The measured rows and the file that has them."""

    def __init__(self, loaded: Loaded, arguments: argparse.Namespace, output: Path) -> None:
        self.start, self.limit, self.output = time.monotonic(), arguments.time_limit, output
        sizes = (arguments.tokens, arguments.scored)
        self.calibration = Windows(loaded, [calibration_text()], arguments.calibration_windows, *sizes)
        self.statistics = statistics_of(self.calibration)
        self.scored = Windows(loaded, evaluation_texts(), arguments.windows, *sizes)
        self.head_dim, self.layers = self.scored.keys.shape[-1], len(self.scored.keys)
        self.record: dict[str, Any] = heading(KIND, VERSION, self.start)
        self.record["environment"]["versions"]["transformers"] = version("transformers")
        self.record["command"] = ["python", "benchmarks/format_study.py"]  # a model's path is of this machine only
        self.record |= {"model": loaded.name, "model_fingerprint": fingerprint(loaded.model), "dtype": "fp32"}
        self.record |= {"tokens": arguments.tokens, "scored_tokens": arguments.scored - 1, "sinks": DEFAULT_SINKS}
        self.record |= {"newest_exact": DEFAULT_WINDOW, "computed_on": loaded.model.device.type}
        for name, held in (("windows", self.scored), ("calibration", self.calibration)):
            self.record[name] = [{"text": window.text, "first": window.first} for window in held.cut]
        self.record |= {"complete": False, "layer_losses": {}, "rows": []}

    def write(self) -> None:
        self.record["seconds"] = round(time.monotonic() - self.start, 1)
        write_text(self.output, plain_json.dumps(self.record))

    def check_time(self) -> None:
        if time.monotonic() - self.start > self.limit:
            raise KeyboardInterrupt

    def measure(self, name: str, layers: Mapping[str, Sequence[str]], listed: bool = True) -> None:
        """Add a row: 'k' and 'v', where they are there, have one variant a layer; `listed`: in the row too."""
        self.check_time()
        began, stored, bits = time.monotonic(), {}, {}
        for tensor, names in layers.items():
            stored[tensor] = torch.empty_like(self.scored.rows(tensor))
            for each in {*names}:
                here = torch.tensor([layer for layer, chosen in enumerate(names) if chosen == each])
                stored[tensor][here] = self.quantized(each, self.scored, here)
            bits[tensor] = sum(Variant.parse(each).stored_bits(self.head_dim) for each in names) / len(names)
        kl, top = self.scored.scores(stored.get("k"), stored.get("v"))
        row = {"name": name, "bits": sum(bits.values()) / len(bits), "k_bits": bits.get("k"), "v_bits": bits.get("v")}
        error = torch.tensor(kl).std().item() / len(kl) ** 0.5 if len(kl) > 1 else None
        row |= {"kl": sum(kl) / len(kl), "kl_standard_error": error, "top1_percent": top, "kl_of_windows": kl}
        row |= {"layers": layers} if listed else {}
        self.record["rows"].append(row | {"seconds": time.monotonic() - began})
        self.write()
        print(line(row), flush=True)

    def quantized(self, name: str, held: Windows, layers: Tensor) -> Tensor:
        """Return what some layers' cold rows are read as."""
        variant = Variant.parse(name)
        known, rows = self.statistics[variant.tensor], held.rows(variant.tensor)
        return quantized(variant, rows[layers], Statistics(known.covariance[layers], known.hessian[layers]))

    def measure_pair(self, name: str) -> None:
        self.measure(name, {each[0]: [each] * self.layers for each in name.split(" + ")}, listed=False)

    def choose(self, options: Sequence[str], values: str) -> None:
        """Measure, with values, the keys of the least query-weighted error of each layer."""
        exact, hessian, every = self.calibration.rows("k"), self.statistics["k"].hessian, torch.arange(self.layers)
        errors = []
        for name in options:
            error = self.quantized(name, self.calibration, every) - exact
            errors.append((error @ hessian * error).sum((1, 2, 3, 4)))
        chosen = [options[best] for best in torch.stack(errors).argmin(0).tolist()]
        layers = {"k": chosen, "v": [values] * self.layers}
        self.measure(f"by weighted error: {' or '.join(options)} + {values}", layers)

    def layer_loss(self, name: str) -> None:
        """Note the KL on the calibration windows where only one layer's tensor is stored so, for each layer."""
        tensor, losses = name[0], []
        stored = self.quantized(name, self.calibration, torch.arange(self.layers))
        for layer in range(self.layers):
            self.check_time()
            rows = self.calibration.rows(tensor).clone()
            rows[layer] = stored[layer]
            kl, _ = self.calibration.scores(*((rows, None) if tensor == "k" else (None, rows)))
            losses.append(max(0.0, sum(kl) / len(kl)))
        self.record["layer_losses"][name] = losses
        print(f"each layer alone, {name}: sum of KL {sum(losses):.6f}", flush=True)

    def mixes(self, budgets: Sequence[float]) -> None:
        for name in MIXED:
            self.layer_loss(name)
        losses = self.record["layer_losses"]
        bits = {name: Variant.parse(name).stored_bits(self.head_dim) for name in losses}
        sets = {"all": MIXED, "no balanced": [name for name in MIXED if "balanced" not in name]}
        for label, names in sets.items():
            for budget in budgets:
                layers = cheapest({name: losses[name] for name in names}, bits, budget)
                self.measure(f"mix of {label}, at most {budget} bits", layers)


def cheapest(losses: Mapping[str, Sequence[float]], bits: Mapping[str, float], budget: float) -> dict[str, list[str]]:
    """Return the variants of 'k' and 'v' of each layer with the least sum of losses at mean bits of at most `budget`.

    A Lagrange multiplier by bisection; then steps that save most for their bits, while they fit (Shoham and Gersho 1988).
    """
    layers = range(len(next(iter(losses.values()))))
    cells = [(tensor, layer) for tensor in "kv" for layer in layers]

    def least(multiplier: float) -> list[str]:
        return [
            min((name for name in losses if name[0] == tensor), key=lambda n: losses[n][layer] + multiplier * bits[n])
            for tensor, layer in cells
        ]

    def mean(names: Sequence[str]) -> float:
        return sum(bits[name] for name in names) / len(names)

    low, high = 1e-12, 1e6
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if mean(least(middle)) > budget else (low, middle)
    chosen = least(high)
    while True:
        room = (budget + 1e-9 - mean(chosen)) * len(chosen)
        steps = []
        for place, (tensor, layer) in enumerate(cells):
            for name in losses:
                saved, more = losses[chosen[place]][layer] - losses[name][layer], bits[name] - bits[chosen[place]]
                if name[0] == tensor and saved > 0 and more <= room:
                    steps.append((saved / max(more, 1e-9), place, name))
        if not steps:
            return {"k": chosen[: len(layers)], "v": chosen[len(layers) :]}
        _, place, name = max(steps)
        chosen[place] = name


def line(row: Mapping[str, Any]) -> str:
    error = "" if row["kl_standard_error"] is None else f" +- {row['kl_standard_error']:.6f}"
    return f"{row['bits']:7.4f} bits  KL {row['kl']:.6f}{error}  top-1 {row['top1_percent']:6.2f} %  {row['name']}"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--variant", action="append", dest="variants", metavar="NAME", help=f"{ACCEPTED}; pairs with ' + '")
    parser.add_argument("--mixes", action="store_true", help="mixes by layer though --variant is given")
    parser.add_argument("--windows", type=int, default=12, help="of the scored texts  [default: 12]")
    parser.add_argument("--calibration-windows", type=int, default=2, help="[default: 2]")
    parser.add_argument("--tokens", type=int, default=4096, help="of a window  [default: 4096]")
    parser.add_argument("--scored", type=int, default=256, help="last tokens of a window, the first not scored  [default: 256]")
    parser.add_argument("--output", type=Path, help="[default: benchmarks/results/cpu/format_study-MODEL.json]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--time-limit", type=float, default=86400.0, help="seconds after which measuring ends")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> bool:
    """Measure; return whether the time sufficed."""
    names = arguments.variants or [*PAIRS, *SINGLE]
    for name in names:
        tensors = [Variant.parse(each).tensor for each in name.split(" + ")]
        if tensors not in (["k"], ["v"], ["k", "v"]):
            raise UsageError(f"variant {name!r} is no pair: give keys, then ' + ', then values")
    least = DEFAULT_SINKS + DEFAULT_WINDOW + PAGE_TOKENS
    if arguments.scored < 2 or arguments.tokens - arguments.scored < least:
        raise UsageError(
            f"--tokens {arguments.tokens} with --scored {arguments.scored} leaves no page of {PAGE_TOKENS} tokens to quantize: "
            f"give at least 2 scored tokens and {least} tokens more than those"
        )
    if min(arguments.windows, arguments.calibration_windows) < 1:
        raise UsageError("--windows and --calibration-windows are at least 1: give more")
    output = arguments.output or RESULTS / f"format_study-{short_name(arguments.model)}.json"
    check_writable(output)
    torch.set_float32_matmul_precision("highest")
    study = Study(load_model(arguments.model, "fp32", arguments.device), arguments, output)
    try:
        for name in names if arguments.variants else PAIRS:
            study.measure_pair(name)
        if arguments.mixes or not arguments.variants:
            for options in CHOICES:
                study.choose(options, "v4 hadamard hessian")
            study.mixes(BUDGETS)
        for name in () if arguments.variants else SINGLE:
            study.measure_pair(name)
        study.record["complete"] = True
        study.write()
    except KeyboardInterrupt:
        print("the time is over: the last variants are not measured", flush=True)
    print("\nBy bits, then by KL:")
    for row in sorted(study.record["rows"], key=lambda each: (each["bits"], each["kl"])):
        print(line(row))
    return bool(study.record["complete"])


def main() -> int:
    try:
        return 0 if run(parsed()) else 1
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    exit_with(main)
