"""Print the Markdown tables of benchmarks/NOTES.md from `results/sample/recipe_study.json`.

    python benchmarks/study_tables.py

Every cell is mean / root mean square of the recipe error; "4" is the four layers of `data/` at 1180 tokens, "30" every
layer at 4096 tokens, two windows.
"""

import json
from pathlib import Path
from typing import Any

from command_line import exit_with

RESULTS = Path(__file__).parent / "results" / "sample" / "recipe_study.json"
BITS = {"bf16": 16, "fp8": 8 + 16 / 2048, "int8": 8 + 16 / 64, "int4": 5}
VALUE_BITS = BITS | {"int4": 4 + 32 / 64, "int4/32": 5, "int4/64": 4.5, "int4/128": 4.25, "int4/192": 4 + 32 / 192}


def cell(row: dict[str, float]) -> str:
    return f"{row['mean']:.4f} / {row['rms']:.4f}"


def table(headers: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(headers) + " |\n|" + "---|" * len(headers))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def main() -> None:
    record = json.loads(RESULTS.read_text(encoding="utf-8"))
    parts: list[dict[str, Any]] = [record["sample"], record["captures"]]
    studies = [part["studies"] for part in parts]

    def cells(study: str, name: str) -> list[str]:
        return [cell(result[study][name]) for result in studies]

    values = [name.partition(",v=")[2] for name in studies[0]["formats"] if name.startswith("k=bf16,v=")]
    for study, title in zip(studies, ("4", "30"), strict=True):
        rows = [[f"`{k}`", *(cell(study["formats"][f"k={k},v={v}"]) for v in values)] for k in ("int8", "fp8", "int4")]
        table([f"{title}: K \\ V", *(f"`{v}` ({VALUE_BITS[v]:.2f} bits)" for v in values)], rows)

    rows = []
    for name, row in parts[1]["equal_bytes"].items():
        pages = row["int4_pages"]
        what = f"pages {pages['fraction']:.2f}, anchors {pages['anchor_every']}" if "fraction" in pages else "int4"
        rows.append([name, f"{row['cold_ratio']:.2f}", cell(parts[0]["equal_bytes"][name]), cell(row), what])
        rows[-1] += [cell(part["equal_bytes"][name]["int4_pages"]) for part in parts]
    table(["tried", "cold x", "4", "30", "int4 at the same bytes", "4", "30"], rows)

    fractions = ["0.875", "0.75", "0.5", "0.25", "0.125", "0.0625"]
    for study, title in zip(studies, ("4", "30"), strict=True):
        rows = [[str(r), *(cell(study["pages"][f"{f}@{r}"]) for f in fractions)] for r in (1, 2, 4, 8, 16)]
        table([f"{title}: anchor_every \\ fraction", *fractions], rows)

    lookups = studies[1]["lookups"]
    rows = [[f, *(f"{lookups[f'{f}@{r}']['mean']:.3f}" for r in (1, 2, 4, 8, 16))] for f in ("0.5", "0.25", "0.125")]
    table([f"30: missed of {lookups['0.5@1']['count']} lookups", "1", "2", "4", "8", "16"], rows)

    rows = []
    for span in ("0.0", "0.25", "0.5", "0.75", "1.0"):
        for way in ("sum of bounds", "largest bound", "sum of softmaxes", "largest softmax"):
            scorers = studies[1]["scorers"]
            rows.append([way, span, *(cell(scorers[f"{way},span {span},{f}"]) for f in ("0.5", "0.25", "0.125", "0.0625"))])
    table(["30: score", "span", "1/2", "1/4", "1/8", "1/16"], rows)

    rows = []
    for anchor in (1, 4):
        for fraction in ("0.5", "0.25", "0.125"):
            whole = cells("pages", f"k=int4,v=int4/64,{fraction}@{anchor}")
            ways = [cells("halves", f"{name},{fraction}@{anchor}") for name in ("int4", "fp16")]
            rows.append([f"{fraction}, anchors {anchor}", *(part for pair in zip(whole, *ways, strict=True) for part in pair)])
    table(["bytes of", *(f"{n}: {w}" for n in ("4", "30") for w in ("pages of 32", "16, int4 ends", "16, fp16 ends"))], rows)

    calibration = studies[1]["calibration"]
    ways = ("uniform", "per head of a layer", "per head of the model")
    rows = [
        [f"{share}, anchors {r}", *(cell(calibration[f"{w},{share}@{r}"]) for w in ways)]
        for r in (1, 4)
        for share in (0.5, 0.25, 0.125)
    ]
    table(["30, second window: mean fraction", *ways], rows)

    rows = []
    for fraction in ("0.5", "0.25", "0.125"):
        rows.append([fraction, *cells("pages", f"k=int4,v=int4/64,{fraction}@1")])
        rows[-1] += cells("rotation", f"rot k,{fraction}@1") + cells("rotation", f"rot v,{fraction}@1")
    table(["fraction", *(f"{n}: {w}" for w in ("as it is", "rotated K", "rotated V") for n in ("4", "30"))], rows)


if __name__ == "__main__":
    exit_with(main)
