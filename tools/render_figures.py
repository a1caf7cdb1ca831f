"""Write the figures in README and docs from the result files; with --check only say whether they are up to date.

A block between `<!-- figures: NAME -->` and `<!-- end -->` is what the function of that name returns.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any, TypeVar

from reliability import reliability as reliability

from elastickv.benchmark import Result
from elastickv.benchmark.stats.intervals import Interval
from elastickv.evaluation.metrics import Estimate
from elastickv.results.kinds.evaluation_result import EvaluationResult
from elastickv.results.kinds.model_result import ModelBenchResult, versions

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (
    ROOT / "README.md",
    *(ROOT / "docs" / name for name in ("BENCHMARKS.md", "RELIABILITY.md", "fidelity.md", "index.md", "run.md")),
)
_BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def load(path: Path | str) -> Any:
    """Return the JSON of a study, which is no result of the program."""
    return json.loads((RESULTS / path).read_text(encoding="utf-8"))


def known(value: T | None) -> T:
    """Return a figure that the committed result has."""
    assert value is not None
    return value


def bench_result(path: Path | str) -> Result:
    return Result.from_dict(load(path), str(path))


def times_us(result: Result) -> dict[str, float]:
    return {timing.name: 1e3 * timing.time_ms for timing in result.contenders}


def source(result: Result) -> str:
    named = ", ".join(f"{name} {version}" for name, version in versions(result.environment).items() if version)
    driver = f", driver {result.gpu.driver}" if result.gpu.driver else ""
    return f"{result.gpu.name}{driver}; {named}; {result.date_utc[:10]}"


def table(headers: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers), *("| " + " | ".join(row) + " |" for row in rows)]


def interval(speedup: Interval) -> str:
    return f"{speedup.estimate:.2f}x [{speedup.low:.2f}, {speedup.high:.2f}]"


def preset_row(name: str, label: str) -> list[str]:
    result = bench_result(name)
    cycle, sample, floor = result.inference_cycle, result.fidelity.sample, result.noise_floor
    return [
        label,
        f"`{result.recipe.text}`",
        f"{result.recipe.ratio_read:.2f}",
        interval(result.speedup),
        f"{cycle.speedup_vs_baseline:.2f}x" if cycle else "",
        f"{sample.recipe_error.mean:.4f}" if sample else "-",
        f"{floor.low:.3f}..{floor.high:.3f}" if floor else "-",
    ]


PRESET_HEADERS = [
    "run",
    "recipe",
    "bytes read 1/",
    "decode step, against the fastest dense",
    "inference cycle",
    "recipe error",
    "A/A",
]


ERROR_NOTE = (
    "Recipe error: relative L2 of a head's output on real activations, mean over layers, heads and consecutive queries, of the "
    "recipe as solved for the same C at the sample's 1180 tokens. A/A: the interval of dense against itself."
)


def headline() -> list[str]:
    rows = [
        preset_row("h100/kernels/8-32-8-128-32768--int4.json", "H100, 8 x 32768 tokens, 32/8 heads x 128"),
        preset_row("h100/kernels/1-32-8-128-131072--int4.json", "H100, 131072 tokens, 32/8 heads x 128"),
        preset_row("h100/kernels/1-32-8-128-131072--auto-8.json", "the same, C=8"),
        preset_row("h100/131072.json", "the same, C=4"),
        preset_row("h100/long.json", "H100, long preset (4096 x 32 x 128), C=4"),
        preset_row("h100/long-original-schedule.json", "the same, the original's schedule"),
        preset_row("cpu/short.json", "CPU, 2 threads, short preset (1024 x 16 x 64), C=2"),
    ]
    return [
        *table(PRESET_HEADERS, rows),
        "",
        ERROR_NOTE,
    ]


def h100() -> list[str]:
    presets = [
        ("short", "short"),
        ("long", "long"),
        ("long-stride", "long, 16 bit"),
        ("long-original-schedule", "long, the original's schedule"),
        ("131072", "131072 tokens"),
        ("131072-original-schedule", "131072, the original's schedule"),
    ]
    lines = [source(bench_result("h100/long.json")), ""]
    lines += table(PRESET_HEADERS, [preset_row(f"h100/{name}.json", label) for name, label in presets])
    rows = []
    for path in sorted((RESULTS / "h100" / "kernels").glob("*--int8.json")):
        result = bench_result(path)
        times = times_us(result)
        peers = {t.name: times[t.name] for t in result.contenders if t.kind == "peer" and t.dtype == "bf16"}
        own = min(time for name, time in times.items() if name.startswith("dense"))
        best = min(peers, key=peers.__getitem__)
        floor = result.recipe.dense_bytes_per_step / result.ceilings["read_gbs"] / 1e3
        rows.append(
            [
                path.stem.removesuffix("--int8").replace("-", ","),
                f"{result.recipe.dense_bytes_per_step / 1e6:.0f}",
                f"{floor:.1f}",
                f"{peers[best]:.1f} ({best.removesuffix('-bf16')})",
                f"{own:.1f}",
                f"{peers[best] / own:.2f}",
                f"{times['elastic']:.1f}",
                interval(result.speedup),
            ]
        )
    rows.sort(key=lambda row: float(row[1]))
    headers = [
        "batch, heads, KV heads, head_dim, context",
        "KV MB",
        "bytes / read ceiling, us",
        "best peer, us",
        "our dense, us",
        "peer / ours",
        "`int8`, us",
        "`int8` against the fastest dense",
    ]
    return [*lines, "", ERROR_NOTE, "", *table(headers, rows), "", *narrow()]


def narrow() -> list[str]:
    """Return the rows of the formats and selections that are kept in pages, beside the peers of the same run."""
    rows = []
    for path in sorted((RESULTS / "h100" / "kernels").glob("*--*.json")):
        result = bench_result(path)
        recipe, times, sample = result.recipe, times_us(result), result.fidelity.sample
        if recipe.text in ("dense", "int8"):
            continue
        peers = {t.name: t.dtype for t in result.contenders if t.kind == "peer"}
        entries = []
        for wide in (True, False):
            named = [name for name, dtype in peers.items() if (dtype in ("bf16", "fp16", "fp32")) == wide]
            best = min(named, key=times.__getitem__, default=None)
            entries += [f"{times[best]:.1f} ({best})", f"{times[best] / times['elastic']:.2f}"] if best else ["-", "-"]
        cycle = result.inference_cycle
        step = f"{1e3 * cycle.elastic_total_ms / cycle.decode_tokens:.1f}" if cycle else "-"
        shape = path.stem.partition("--")[0].replace("-", ",")
        error = f"{sample.recipe_error.mean:.4f}" if sample else "-"
        row = [shape, f"`{recipe.text}`", f"{recipe.ratio_read:.2f}", f"{times['elastic']:.1f}", *entries, step, error]
        rows.append((recipe.dense_bytes_per_step, row))
    headers = [
        "batch, heads, KV heads, head_dim, context",
        "recipe",
        "bytes read 1/",
        "decode, us",
        "best 16-bit peer, us",
        "peer / this",
        "best 8-bit peer, us",
        "peer / this",
        "whole step with append, us",
        "recipe error",
    ]
    return table(headers, [row for _, row in sorted(rows, key=lambda entry: entry[0])])


def cpu() -> list[str]:
    record = load("cpu/decode.json")
    named = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    lines = [f"{record['device']['name']}, {record['device']['compute_units']} threads; {named}; {record['date'][:10]}"]
    for result in record["results"]:
        rows = [
            [
                f"`{row['name']}`",
                f"{row['ratio_read']:.2f}",
                f"{row['median_ms']:.3f}",
                f"{row['gbs']:.1f}",
                f"{row['of_read_ceiling']:.2f}",
                f"{row['fastest_dense_time_over_this']:.2f}",
                "" if row["kernel_error"] is None else f"{row['kernel_error']:.0e}",
            ]
            for row in result["rows"]
        ]
        headers = ["", "C read", "median ms", "GB/s", "of read ceiling", "fastest own dense / this", "kernel error"]
        title = f"{result['workload']}: read ceiling {result['read_gbs']:.1f} GB/s, fastest dense {result['fastest_dense']}"
        lines += ["", title, "", *table(headers, rows)]
    return lines


def aa() -> list[str]:
    record = load("cpu/aa_study.json")
    return [
        f"{record['device']}, {record['environment']['date_utc'][:10]}: {record['contained_1']} of {record['comparisons']} "
        f'A/A intervals contain 1.0 ({0.95 * record["comparisons"]:.0f} expected); {record["false_faster"]} say "faster".'
    ]


def statistics() -> list[str]:
    record = load("reliability/statistics.json")
    samples = sorted({row["samples"] for row in record["conditions"]})
    lines = [
        f"{record['date_utc'][:10]}, {record['replications']} replications each (standard error of a share of 95 %: "
        f"{record['conditions'][0]['standard_error']:.1%}). Percent of intervals that hold the truth, by samples:"
    ]
    for kind, told in record["summary"].items():
        rows: dict[str, list[str]] = {}
        for row in record["conditions"]:
            if row["kind"] == kind and row["ratio"] == 1:
                rows.setdefault(row["stream"], [row["stream"]]).append(f"{100 * row['coverage']:.1f}")
        said = told["result_says_faster_most"]
        lines += [
            "",
            f"{kind[0].upper()}{kind[1:]}: {100 * told['false_faster_mean']:.1f} % of equals have an interval above 1 (most: "
            f"{100 * told['false_faster_most']:.1f} %)"
            + ("." if said is None else f'; a result says "faster" of at most {100 * said:.1f} %.'),
            "",
            *table(["stream", *map(str, samples)], list(rows.values())),
        ]
    return lines


def recipe_errors() -> list[str]:
    record = load("sample/recipe_errors.json")
    keys = ("mean", "p95", "max")
    rows = [
        [f"`{entry['recipe']}`", f"{entry['read_ratio']:.2f}", *(f"{entry['error'][key]:.4f}" for key in keys)]
        for entry in record["recipes"]
    ]
    return table(["recipe", "bytes read 1/", "mean", "p95", "max"], rows)


def bootstrap(figure: Estimate, digits: int) -> str:
    return f"{figure.mean:.{digits}f} [{figure.low:.{digits}f}, {figure.high:.{digits}f}]"


def fidelity() -> list[str]:
    paths = sorted((RESULTS / "cpu").glob("fidelity-smollm2-135m-[0-9]*.json"), key=lambda path: int(path.stem.split("-")[-1]))
    evaluations = [EvaluationResult.from_dict(load(path), str(path)) for path in paths]
    rows = [
        [
            str(row.context),
            f"{row.compress:g}",
            f"`{row.recipe_hash}`",
            f"{row.read_ratio:.2f}",
            f"{row.stored_ratio:.2f}",
            bootstrap(row.ppl_change_percent, 2),
            bootstrap(row.kl, 4),
            bootstrap(row.top1_percent, 1),
            f"{row.windows} x {row.scored_tokens // row.windows}",
        ]
        for evaluation in evaluations
        for row in evaluation.rows
    ]
    first = evaluations[0]
    environment, calibration = first.environment, known(first.calibration)
    headers = ["context", "C", "recipes", "read 1/", "stored 1/", "d-PPL %", "KL", "top-1 %", "windows x tokens scored"]
    lines = [
        f"{first.model.name} in float32 on {environment['cpu']}; torch {environment['torch']}, transformers "
        f"{environment['transformers']}; {environment['date_utc'][:10]}. Calibrated on {calibration.tokens} tokens of "
        f"{calibration.text}; scored on {', '.join(first.texts)}.",
        "",
        *table(headers, rows),
    ]
    name = "cpu/fidelity-smollm2-135m-needle.json"
    for row in EvaluationResult.from_dict(load(name), name).needle:
        counts = ", ".join(f"{cache} {sum(hits)}" for cache, hits in row.found.items())
        lines += ["", f"Pass keys found of {len(row.depths)} in {row.tokens} tokens: {counts}."]
    return lines


MODEL_CELLS = (("4096x1", "4096"), ("32768x1", "32768"), ("65536x1", "65536"), ("32768x8", "8 x 32768"))
MODEL_NOTE = (
    "The floor is a step's bytes (the weights that it reads, and the recipe's keys and values) at the read ceiling measured "
    "beside it. Greedy decoding; nothing is compiled but the static cache's steps."
)


def models() -> list[str]:
    """Return the whole-model figures: milliseconds a step of every cache, and what the elastic one holds."""
    rows = []
    paths = {label: f"h100/model-8b-{name}.json" for name, label in MODEL_CELLS}
    results = {label: ModelBenchResult.from_dict(load(path), path) for label, path in paths.items()}
    for label, result in results.items():
        by_name = {cache.cache: cache for cache in result.caches}
        ours, best = by_name["elastic"], result.baseline
        steps = [
            f"{known(by_name[cache].step_ms).estimate:.2f}" if cache in by_name else "not run: no memory"
            for cache in ("stock", "stock static+compile", "elastic")
        ]
        rows.append(
            [
                label,
                *steps,
                "-" if best is None else interval(known(result.speedups[best])),
                f"{ours.of_floor:.2f}",
                f"{ours.held_ratio:.2f}",
                f"{known(ours.peak_bytes) / 1e9:.1f}",
                f"{ours.first_token_s:.2f}",
                f"{100 * known(ours.storing_share_of_first_token):.1f} %",
            ]
        )
    headers = [
        "context",
        "stock, ms",
        "static cache + compile, ms",
        "elastic, ms",
        "elastic, against the better",
        "x of the floor",
    ]
    headers += ["held, 1/x of 16 bit", "peak beyond weights, GB", "first token, s", "of it storing"]
    environment, machine = results[MODEL_CELLS[-1][1]].environment, results[MODEL_CELLS[-1][1]].machine
    used = versions(environment)
    return [
        f"`shape:8b` (32 layers, 32/8 heads x 128, random weights, bf16) with compress=4 on {machine['name']}, driver "
        f"{machine['driver']}, host {environment['cpu']}; torch {used['torch']}, transformers {used['transformers']}; "
        f"{environment['date_utc'][:10]}.",
        "",
        *table(headers, rows),
        "",
        MODEL_NOTE,
    ]


def render(document: Path) -> str:
    def block(match: re.Match[str]) -> str:
        lines = globals()[match[2]]()
        return match[1] + "\n".join(lines) + "\n" + match[3]

    return _BLOCK.sub(block, document.read_text(encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for document in DOCUMENTS:
        text = render(document)
        if text != document.read_text(encoding="utf-8"):
            stale.append(document)
            if not check:
                document.write_text(text, encoding="utf-8")
    if check and stale:
        print(f"out of date: {', '.join(str(path.relative_to(ROOT)) for path in stale)}; run python tools/render_figures.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
