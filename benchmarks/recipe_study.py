"""What recipes cost on real activations: the tables behind the solver. NumPy, no backend's rounding.

    python benchmarks/recipe_study.py [--input FILE ...] [--only STUDY ...]
    python benchmarks/recipe_study.py --losses

Writes `results/sample/recipe_study.json` (every study, of the sample in `data/` and, if given, captures of every layer as
`capture_sample.py --tokens` writes them: two windows of one text, the first to calibrate on and the second to test on);
`study_tables.py` prints it as tables. `--losses` writes the solver's figures, `src/elastickv/recipe/losses.json`, from that
file's captures.

A loss is a recipe error as a result defines it: relative L2 of a head's output against dense attention on the unquantized
keys and values, one per layer x query head x query; the solver's is the root mean square of all.
"""

import argparse
import datetime
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from command_line import exit_with
from replay import Bools, Float32, Head, listed
from scipy.linalg import hadamard
from storage import package, shared_scale, tried

from elastickv import __version__
from elastickv.benchmark.sample_inputs import load_sample
from elastickv.kvcache.quantize import quantize_int4_keys
from elastickv.kvcache.scorers.bounds import page_bounds, score_pages
from elastickv.recipe.regions import selected

FRACTIONS = (1.0, 7 / 8, 3 / 4, 1 / 2, 3 / 8, 1 / 4, 3 / 16, 1 / 8, 3 / 32, 1 / 16, 1 / 32, 1 / 64)
ANCHORS = (1, 2, 4, 8, 16)
FORMATS = ("bf16", "fp8", "int8", "int4")
GROUPS = (32, 64, 128, 192)
COMBINED = ("k=int4,v=int4/64", "k=int4,v=int4/32", "k=int4,v=int8")
# Four whole layers at 1180 tokens: the sample that was shipped when the studies were made.
SAMPLE = Path(__file__).parent / "data" / "smollm2-135m.safetensors"
RESULTS = Path(__file__).parent / "results" / "sample" / "recipe_study.json"
LOSSES = Path(__file__).parents[1] / "src" / "elastickv" / "recipe" / "losses.json"
Errors = dict[str, Float32]


def heads_of(path: Path) -> Iterator[tuple[int, int, Head, Float32]]:
    """Yield layer, KV head, the head, and the values of all KV heads of the layer, starting with its own."""
    sample = load_sample(path)
    group = sample.shape.group
    for layer in range(sample.layers):
        for kv in range(sample.shape.kv_heads):
            rows = slice(kv * group, (kv + 1) * group)
            yield (
                layer,
                kv,
                Head(sample.q[layer, rows], sample.k[layer, kv], sample.v[layer, kv]),
                np.roll(sample.v[layer], -kv, axis=0),
            )


def stored_pages(head: Head, all_values: Float32) -> tuple[dict[str, Float32], dict[str, Float32]]:
    """Return keys and values as each format of the package reads them, int4 values by `int4/group`."""
    keys, values = head.pages
    dim = keys.shape[-1]
    stored_keys = {fmt: package(fmt, False, dim, dim).store(keys) for fmt in FORMATS}
    stored_values = {fmt: package(fmt, True, dim, dim).store(values) for fmt in FORMATS if fmt != "int4"}
    for group in GROUPS:
        if group <= dim:
            stored_values[f"int4/{group}"] = package("int4", True, group, dim).store(values)
        elif group <= dim * len(all_values):
            # A group wider than this model's head: its scale is shared with channels of the neighboring heads.
            wide = np.concatenate([Head(head.q, head.k, v).pages[1] for v in all_values[: group // dim]], axis=-1)
            stored_values[f"int4/{group}"] = shared_scale(wide, 15, group)[..., :dim]
    return stored_keys, stored_values


def whole_head_scores(head: Head, span: float = 0.5) -> tuple[Float32, Float32]:
    """Return ((group, queries, pages) bounds, their (queries, pages) score)."""
    _, scales, zeros = quantize_int4_keys(head.pages[0])
    bounds = page_bounds(head.q.reshape(-1, head.q.shape[-1]), scales, zeros, span=span)
    bounds = np.where(head.all_pages, bounds.reshape(*head.q.shape[:2], -1), -1e30)
    return bounds.astype(np.float32), score_pages(bounds).astype(np.float32)


def counts(head: Head, fraction: float) -> np.ndarray:
    return np.array([selected(int(pages), fraction) for pages in head.cold_pages])


def study_formats(head: Head, keys: dict[str, Float32], values: dict[str, Float32]) -> Errors:
    errors = {f"k={k},v={v}": head.errors(head.output(keys[k], values[v])) for k in FORMATS for v in values}
    for name, (k, v) in tried(head.q.shape[-1]).items():
        errors[name] = head.errors(head.output(k.store(head.pages[0]), v.store(head.pages[1])))
    return errors


def study_pages(head: Head, keys: dict[str, Float32], values: dict[str, Float32]) -> Errors:
    """Fractions x anchors on 16-bit keys and values (the selection's own loss), and on some formats (the combination's)."""
    _, scores = whole_head_scores(head)
    errors = {"nothing": head.errors(head.output(keys["bf16"], values["bf16"], np.zeros_like(head.all_pages)))}
    for fraction in FRACTIONS[1:]:
        for anchor in ANCHORS:
            read = listed(head, scores, counts(head, fraction), anchor)
            errors[f"{fraction}@{anchor}"] = head.errors(head.output(keys["bf16"], values["bf16"], read))
            for pair in COMBINED if anchor in (1, 4) else ():
                k, v = (part.partition("=")[2] for part in pair.split(","))
                errors[f"{pair},{fraction}@{anchor}"] = head.errors(head.output(keys[k], values[v], read))
    return errors


def study_scorers(head: Head, keys: dict[str, Float32], values: dict[str, Float32]) -> Errors:
    """How the bounds of a group's query heads become one score a page, and how wide the bounds are."""
    errors = {}
    for span in (0.0, 0.25, 0.5, 0.75, 1.0):
        bounds, total = whole_head_scores(head, span)
        top = bounds.max(-1, keepdims=True)
        log_votes = bounds - top - np.log(np.exp(bounds - top).sum(-1, keepdims=True))
        ways = {
            "sum of bounds": total,
            "largest bound": bounds.max(0),
            "largest softmax": log_votes.max(0),
            "sum of softmaxes": np.exp(log_votes).sum(0),
        }
        for fraction in (1 / 2, 1 / 4, 1 / 8, 1 / 16):
            for name, scores in ways.items():
                read = listed(head, scores, counts(head, fraction), 1)
                errors[f"{name},span {span},{fraction}"] = head.errors(head.output(keys["int4"], values["int4/64"], read))
    return errors


def study_halves(head: Head, keys: dict[str, Float32], values: dict[str, Float32]) -> Errors:
    """Selection of 16 tokens, their codes under the page's 32-token scales, at the bytes that 32 take.

    `fp16`: exact minima and maxima of 16 tokens in fp16 are scored instead of the scales; `int4`: in 4 bits, under the page's
    scale and zero, which are read too.
    """
    pages = head.pages[0]
    dim = pages.shape[-1]
    codes, scales, zeros = quantize_int4_keys(pages)
    wide, base = scales.astype(np.float32)[:, None], zeros.astype(np.float32)[:, None]
    low, high = (fold(pages.reshape(-1, 16, dim), axis=1) for fold in (np.min, np.max))
    halves = codes.reshape(len(pages), 2, 16, dim)
    coded = [(fold(halves, axis=2) * wide + base).reshape(-1, dim) for fold in (np.min, np.max)]
    per_token, per_page, number = dim + 4, 4 * dim, head.cold_pages
    errors = {}
    for fraction in (1 / 2, 1 / 4, 1 / 8):
        for anchor in (1, 4):
            whole = counts(head, fraction) * (32 * per_token + per_page)
            for name, (least, most), extra in (("fp16", (low, high), per_page), ("int4", coded, per_page / 2)):
                budget = whole - number * extra / anchor
                count = np.maximum(budget // (16 * per_token + per_page), 1).astype(int)
                scores = score_pages(
                    page_bounds(head.q.reshape(-1, dim), (most - least) / 15, least).reshape(*head.q.shape[:2], -1)
                ).astype(np.float32)
                read = listed(head, scores, count, anchor, halves=2)
                errors[f"{name},{fraction}@{anchor}"] = head.errors(head.output(keys["int4"], values["int4/64"], read))
    return errors


def study_rotation(head: Head, keys: dict[str, Float32], values: dict[str, Float32]) -> Errors:
    """Pages by the bounds of Hadamard-rotated int4 keys, and values rotated alone."""
    dim = head.q.shape[-1]
    turn = (hadamard(dim) / np.sqrt(dim)).astype(np.float32)
    turned = Head(head.q @ turn, head.k @ turn, head.v)
    rotated_keys = package("int4", False, dim, dim).store(head.pages[0] @ turn) @ turn.T
    rotated_values = package("int4", True, dim, dim).store(head.pages[1] @ turn) @ turn.T
    errors = {}
    for fraction in (1 / 2, 1 / 4, 1 / 8):
        ways = {"rot k": (turned, rotated_keys, values["int4/64"]), "rot v": (head, keys["int4"], rotated_values)}
        for name, (scored, k, v) in ways.items():
            read = listed(head, whole_head_scores(scored)[1], counts(head, fraction), 1)
            errors[f"{name},{fraction}@1"] = head.errors(head.output(k, v, read))
    return errors


def study_lookups(head: Head, keys: dict[str, Float32], values: dict[str, Float32]) -> Errors:
    """Of queries with over 30 % of all mass on one cold token, those whose page is not read: 1 where missed, 0 where read."""
    _, scores = whole_head_scores(head)
    cold = np.einsum("gnd,ptd->gnpt", head.q, keys["bf16"]) / np.sqrt(np.float32(head.q.shape[-1]))
    cold = np.where(head.all_pages[None, :, :, None], cold, -np.inf)
    top = np.maximum(cold.max((-1, -2)), head.exact_lse)
    mass = np.exp(cold - top[..., None, None])
    mass /= (mass.sum((-1, -2)) + np.exp(head.exact_lse - top))[..., None, None]
    heaviest = mass.max(-1)
    asks, page = heaviest.max(-1) > 0.3, heaviest.argmax(-1)
    missed = {}
    for fraction in (1 / 2, 1 / 4, 1 / 8):
        for anchor in ANCHORS:
            read = np.broadcast_to(listed(head, scores, counts(head, fraction), anchor), heaviest.shape)
            missed[f"{fraction}@{anchor}"] = 1 - np.take_along_axis(read, page[..., None], -1)[..., 0][asks].astype(np.float32)
    return missed


STUDIES = {
    "formats": study_formats,
    "pages": study_pages,
    "scorers": study_scorers,
    "halves": study_halves,
    "rotation": study_rotation,
    "lookups": study_lookups,
}


def of_head(names: list[str], item: tuple[int, int, Head, Float32]) -> tuple[int, int, dict[str, Errors]]:
    layer, kv, head, all_values = item
    keys, values = stored_pages(head, all_values)
    return layer, kv, {name: STUDIES[name](head, keys, values) for name in names}


def ragged(head: Head, fraction: float, anchor: int) -> Float32:
    dim = head.q.shape[-1]
    keys, values = (package("int4", is_value, dim, dim).store(pages) for is_value, pages in enumerate(head.pages))
    read: Bools = listed(head, whole_head_scores(head)[1], counts(head, fraction), anchor)
    return head.errors(head.output(keys, values, read))


def allotted(losses: np.ndarray, share: float) -> np.ndarray:
    """Return the fraction of each head: least total loss with a mean fraction of `share`, steps along the convex hull.

    Parameters
    ----------
    losses : (heads, fractions) in the order of FRACTIONS.
    """
    steps = []
    for number, row in enumerate(losses):
        at = len(FRACTIONS) - 1
        while at > 0:
            slopes = [(row[at] - row[to]) / (FRACTIONS[to] - FRACTIONS[at]) for to in range(at)]
            to = int(np.argmax(slopes))
            steps.append((-slopes[to], number, FRACTIONS[at], FRACTIONS[to]))
            at = to
    fractions = np.full(len(losses), FRACTIONS[-1])
    left = share * len(losses) - fractions.sum()
    for slope, number, start, stop in sorted(steps):
        if left <= 0 or slope >= 0:
            break
        fractions[number] = start + min(stop - start, left)
        left -= stop - start
    return fractions


def study_calibration(first: Path, second: Path, heads: list[tuple[int, int, dict[str, Errors]]]) -> dict[str, Any]:
    """Fractions per (layer, KV head) from the first window, tested on the second, at equal pages; least summed squares."""
    table = {}
    for anchor in (1, 4):
        name = "k=int4,v=int4/64"
        pages = [[f["pages"][f"{name},{fr}@{anchor}"] for fr in FRACTIONS[1:]] for *_, f in heads]
        base = [f["formats"][name] for *_, f in heads]
        losses = np.array([[np.square(e).mean() for e in (b, *p)] for b, p in zip(base, pages, strict=True)])
        layers = np.array([layer for layer, *_ in heads])
        tests = list(heads_of(second))
        for share in (1 / 2, 1 / 4, 1 / 8):
            by_layer = np.concatenate([allotted(losses[layers == n], share) for n in np.unique(layers)])
            for way, fractions in (
                ("uniform", np.full(len(layers), share)),
                ("per head of a layer", by_layer),
                ("per head of the model", allotted(losses, share)),
            ):
                errors = [ragged(head, float(f), anchor) for (*_, head, _), f in zip(tests, fractions, strict=True)]
                table[f"{way},{share}@{anchor}"] = summary(errors)
    return table


def summary(errors: list[Float32]) -> dict[str, float]:
    every = np.concatenate([e.ravel() for e in errors]).astype(np.float64)
    if not every.size:
        return {"count": 0}
    return {
        "count": every.size,
        "mean": float(every.mean()),
        "rms": float(np.sqrt((every**2).mean())),
        "p95": float(np.quantile(every, 0.95)),
        "max": float(every.max()),
    }


def summaries(heads: list[tuple[int, int, dict[str, Errors]]], names: list[str]) -> dict[str, dict[str, Any]]:
    first = heads[0][2]
    return {study: {name: summary([f[study][name] for *_, f in heads]) for name in first[study]} for study in names}


def equal_bytes(table: dict[str, dict[str, Any]], head_dim: int = 64) -> dict[str, Any]:
    """Return what int4 with pages loses at the cold bytes of each storage that was tried, and the fraction it reads.

    Of int4 with pages, the better of anchors every step and every four; between measured fractions, on the line over their
    logarithm.
    """
    key, value = package("int4", False, head_dim, head_dim), package("int4", True, head_dim, head_dim)
    whole, plane = key.bytes_per_token + value.bytes_per_token, 4 * head_dim / 32
    at, rows = -np.log2(FRACTIONS), {}
    for name, (k, v) in tried(head_dim).items():
        budget, by_anchor = k.bytes_per_token + v.bytes_per_token, {}
        for anchor in (1, 4):
            fraction = (budget - plane / anchor) / whole
            if 0 < fraction < 1:
                curve = [table["pages"][f"{COMBINED[0]},{f}@{anchor}"] for f in FRACTIONS[1:]]
                curve = [table["formats"][COMBINED[0]], *curve]
                loss = {m: float(np.interp(-np.log2(fraction), at, [point[m] for point in curve])) for m in ("mean", "rms")}
                by_anchor[anchor] = {"fraction": fraction, "anchor_every": anchor, **loss}
        own = {measure: table["formats"][name][measure] for measure in ("mean", "rms")}
        best = min(by_anchor.values(), key=lambda row: row["rms"]) if budget < whole else table["formats"][COMBINED[0]]
        rows[name] = {"cold_ratio": 4 * head_dim / budget, **own, "int4_pages": best}
    return rows


def provenance(paths: list[Path]) -> dict[str, Any]:
    inputs = []
    for path in paths:
        sample = load_sample(path)
        inputs.append(
            {
                "model": sample.metadata["model"],
                "text": sample.metadata["text"],
                "layers": sample.layers,
                "tokens": sample.tokens,
                "queries": sample.queries,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
        )
    return {
        "date_utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"elastickv": __version__, "numpy": version("numpy")},
        "script": "benchmarks/recipe_study.py",
        "inputs": inputs,
    }


def losses(table: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the solver's figures: root mean square errors of format pairs, of selections, and of reading nothing cold."""
    rms = {study: {name: round(row["rms"], 5) for name, row in rows.items()} for study, rows in table.items()}
    pages = {str(r): [[fraction, rms["pages"][f"{fraction}@{r}"]] for fraction in FRACTIONS[1:]] for r in ANCHORS}
    return {
        "formats": {name: rms["formats"][name] for name in pair_names()},
        "pages": pages,
        "nothing": rms["pages"]["nothing"],
    }


def pair_names() -> list[str]:
    values = [fmt for fmt in FORMATS if fmt != "int4"] + [f"int4/{group}" for group in GROUPS]
    return [f"k={k},v={v}" for k in FORMATS for v in values]


def write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--input", type=Path, nargs="*", default=[], help="captures of every layer, two windows")
    parser.add_argument("--losses", action="store_true", help="only write the solver's table, from the results there are")
    parser.add_argument(
        "--only", nargs="*", choices=[*STUDIES, "calibration"], help="renew these studies of the results there are"
    )
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    before = json.loads(RESULTS.read_text(encoding="utf-8")) if options.losses or options.only else None
    if options.losses:
        captures = before["captures"]
        source = {key: captures[key] for key in ("versions", "script", "inputs")}
        write(LOSSES, {"date_utc": captures["dates_utc"]["pages"], **source, **losses(captures["studies"])})
        return
    names = options.only or [*STUDIES, "calibration"]
    record = {"sample": provenance([SAMPLE]), "captures": provenance(options.input)}
    for key in record:
        record[key]["studies"] = before[key]["studies"] if before else {}
        record[key]["dates_utc"] = (before[key]["dates_utc"] if before else {}) | dict.fromkeys(names, record[key]["date_utc"])
    per_head = [name for name in names if name != "calibration"]
    # Calibration reads what the first window lost by format and fraction.
    needed = sorted({*per_head, *(("formats", "pages") if "calibration" in names else ())})
    with ProcessPoolExecutor(options.processes) as pool:
        record["sample"]["studies"] |= summaries(list(pool.map(partial(of_head, per_head), heads_of(SAMPLE))), per_head)
        wanted = [needed if number == 0 else per_head for number in range(len(options.input))]
        windows = [list(pool.map(partial(of_head, w), heads_of(p))) for w, p in zip(wanted, options.input, strict=True)]
    if windows:
        record["captures"]["studies"] |= summaries([head for window in windows for head in window], per_head)
    if len(windows) > 1 and "calibration" in names:
        record["captures"]["studies"]["calibration"] = study_calibration(*options.input[:2], windows[0])
    for part in record.values():
        if part["studies"]:
            part["equal_bytes"] = equal_bytes(part["studies"])
    write(RESULTS, record)


if __name__ == "__main__":
    exit_with(main)
