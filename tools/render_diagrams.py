"""Write the diagrams of docs/architecture.md as SVG files; with --check, only report whether they are up to date.

A site page fetches nothing from another server, so the diagrams are files and not Mermaid, whose script comes from a CDN.
"""

import argparse
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

ASSETS = Path(__file__).resolve().parents[1] / "docs" / "assets"

# Import order, top first: a package imports from its own row and the rows below it.
TREE: tuple[tuple[tuple[str, str], ...], ...] = (
    (("cli", "command line"),),
    (("api", "bench, sweep, compare, report, load"), ("sweeps", "grids of cells"), ("lm_eval", "for the harness")),
    (("html_report", "report page"), ("model_benchmark", "whole-model speed")),
    (("results", "load, compare, format"), ("evaluation", "quality of a model")),
    (("benchmark", "paired micro-benchmark"), ("transformers", "ElasticCache"), ("vllm", "attention backend")),
    (("backends", "cpu: Numba, cuda: NVRTC"),),
    (("kvcache", "protocol, quantizers, float64 reference"),),
    (("recipe", "formats, byte counts, solver"),),
    (("inputs", "bounded file reading"),),
    (("errors", "error types"), ("version", "of the package")),
)

# A decode step: the kernels in launch order, and for each the memory that it writes or reads (all, or the named part).
MEMORY = ("window: exact rows", "cold pages: codes, scales", "page list", "output")
STEP: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("append", "store the new K, V row;|quantize the page that|leaves the window", {MEMORY[0]: "write", MEMORY[1]: "write"}),
    ("select", "at an anchor: score pages by|their key scales, keep the best", {MEMORY[1]: "scales", MEMORY[2]: "write"}),
    ("decode", "split-KV attention over the|sinks, window and listed|pages; merge by log-sum-exp",
     {MEMORY[0]: "read", MEMORY[1]: "listed pages", MEMORY[2]: "read", MEMORY[3]: "write"}),
)  # fmt: skip

INK, LINE, FILL, MEMORY_FILL = "#1a237e", "#5c6bc0", "#e8eaf6", "#fff3e0"
STYLE = f"text{{font-family:system-ui,sans-serif;fill:{INK}}} .name{{font-weight:600;font-size:15px}} .note{{font-size:12px}}"


def tree() -> str:
    """Return the packages as rows of boxes, top first."""
    width, row_height, box_height, gap, margin = 720, 62, 46, 12, 16
    parts: list[str] = []
    for index, row in enumerate(TREE):
        top = margin + index * row_height
        box_width = (width - 2 * margin - (len(row) - 1) * gap) / len(row)
        for column, (name, note) in enumerate(row):
            left = margin + column * (box_width + gap)
            parts += _box(left, top, box_width, box_height, name, [note], FILL)
        if index + 1 < len(TREE):
            parts.append(_arrow(width / 2, top + box_height, width / 2, top + row_height))
    return _svg(width, margin + len(TREE) * row_height, "The packages of ElasticKV in import order", parts)


def decode_step() -> str:
    """Return the kernels of a decode step on the left, and the memory that they read and write on the right."""
    width, row_height, margin = 760, 124, 16
    kernel_width, memory_left, memory_width, memory_height = 250, 520, 224, 46
    height = margin * 2 + row_height * len(STEP)
    memory_top = {name: margin + index * (height - 2 * margin) / len(MEMORY) + 20 for index, name in enumerate(MEMORY)}
    parts: list[str] = []
    for name, top in memory_top.items():
        title, _, note = name.partition(": ")
        parts += _box(memory_left, top, memory_width, memory_height, title, [note] if note else [], MEMORY_FILL)
    for index, (name, note, uses) in enumerate(STEP):
        top = margin + index * row_height
        parts += _box(margin, top, kernel_width, row_height - 24, name, note.split("|"), FILL)
        if index + 1 < len(STEP):
            parts.append(_arrow(margin + kernel_width / 2, top + row_height - 24, margin + kernel_width / 2, top + row_height))
        for number, (memory, use) in enumerate(uses.items()):
            kernel_y = top + (number + 1) * (row_height - 24) / (len(uses) + 1)
            memory_y = memory_top[memory] + memory_height * (index + 1) / (len(STEP) + 1)
            start, end = (margin + kernel_width, kernel_y), (float(memory_left), memory_y)
            parts.append(_arrow(*start, *end) if use == "write" else _arrow(*end, *start))
            if use not in ("read", "write"):
                parts.append(_label(start[0] + 0.25 * (end[0] - start[0]), start[1] + 0.25 * (end[1] - start[1]) - 5, use))
    return _svg(width, height, "The kernels of a decode step and the memory that they read and write", parts)


def _box(left: float, top: float, width: float, height: float, name: str, notes: list[str], fill: str) -> Iterator[str]:
    middle, lines = left + width / 2, len(notes) + 1
    first = top + height / 2 - 8 * (lines - 1) + 5
    yield f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" rx="6" fill="{fill}" stroke="{LINE}"/>'
    yield f'<text class="name" x="{middle:g}" y="{first:g}" text-anchor="middle">{escape(name)}</text>'
    for index, note in enumerate(notes, 1):
        yield f'<text class="note" x="{middle:g}" y="{first + 16 * index:g}" text-anchor="middle">{escape(note)}</text>'


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{LINE}" stroke-width="1.5" marker-end="url(#head)"/>'


def _label(x: float, y: float, text: str) -> str:
    return f'<text class="note" x="{x:g}" y="{y:g}" text-anchor="middle">{escape(text)}</text>'


def _svg(width: float, height: float, title: str, parts: list[str]) -> str:
    head = (
        f'<marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{LINE}"/></marker>'
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img">',
        f"<title>{escape(title)}</title><style>{STYLE}</style><defs>{head}</defs>",
        f'<rect width="{width:g}" height="{height:g}" rx="8" fill="#ffffff"/>',
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


DIAGRAMS = {"tree.svg": tree, "decode-step.svg": decode_step}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for name, draw in DIAGRAMS.items():
        path, text = ASSETS / name, draw()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.write_text(text, encoding="utf-8")
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run python tools/render_diagrams.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
