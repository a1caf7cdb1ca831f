"""Run a notebook's cells in this Python, and write it with its outputs as .ipynb and as one .html file.

    python tools/run_notebook.py notebooks/elastickv_quickstart.ipynb -o executed

For machines without Jupyter. Like Jupyter, it shows a cell's last expression, by `_repr_html_` if it has one. Output of the
cells is also printed while they run. Exit code 1 if a cell fails; both files are still written, up to that cell.
"""

import argparse
import ast
import html
import io
import json
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

STYLE = (
    "body { font: 16px/1.5 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em }"
    "pre { background: #f4f4f4; padding: .7em; overflow: auto; font-size: 85% }"
    ".out { border-left: 3px solid #ccc; padding-left: 1em; overflow: auto }"
    "td, th { padding: .1em .6em; text-align: left } svg { max-width: 100%; height: auto }"
)


class Tee(io.StringIO):
    """Records text and also writes it to another stream."""

    def __init__(self, target: Any) -> None:
        super().__init__()
        self.target = target

    def write(self, text: str) -> int:
        self.target.write(text)
        self.target.flush()
        return super().write(text)


def outputs_of(source: str, names: dict[str, Any], count: int) -> tuple[list[dict[str, Any]], bool]:
    """Run a cell; return its outputs in nbformat's form, and whether it succeeded."""
    outputs: list[dict[str, Any]] = []
    value, failed = None, None
    out, err = Tee(sys.stdout), Tee(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            tree = ast.parse(source)
            last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, f"<cell {count}>", "exec"), names)
            if isinstance(last, ast.Expr):
                value = eval(compile(ast.Expression(last.value), f"<cell {count}>", "eval"), names)
        except Exception as error:
            failed = error
    for name, stream in (("stdout", out), ("stderr", err)):
        if stream.getvalue():
            outputs.append({"output_type": "stream", "name": name, "text": stream.getvalue()})
    if value is not None:
        data = {"text/plain": repr(value)}
        if hasattr(value, "_repr_html_"):
            data["text/html"] = value._repr_html_()
        outputs.append({"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": data})
    if failed is not None:
        traceback.print_exception(failed)
        name, message = type(failed).__name__, str(failed)
        outputs.append(
            {"output_type": "error", "ename": name, "evalue": message, "traceback": traceback.format_exception(failed)}
        )
    return outputs, failed is None


def execute(notebook: dict[str, Any]) -> bool:
    """Run all code cells in one namespace, up to the first that fails; store their outputs in the notebook."""
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for count, cell in enumerate(cells, 1):
        cell["outputs"], succeeded = outputs_of("".join(cell["source"]), names, count)
        cell["execution_count"] = count
        if not succeeded:
            return False
    return True


def page(notebook: dict[str, Any], title: str) -> str:
    """Return the notebook as one HTML file."""
    markdown, parts = MarkdownIt(), []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(markdown.render(source))
            continue
        parts.append(f"<details><summary>code</summary><pre>{html.escape(source)}</pre></details>")
        parts += [f"<div class=out>{shown(output)}</div>" for output in cell["outputs"]]
    head = "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
    return f"{head}<title>{title}</title><style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"


def shown(output: dict[str, Any]) -> str:
    """Return one output as HTML."""
    if output["output_type"] == "stream":
        return f"<pre>{html.escape(''.join(output['text']))}</pre>"
    if output["output_type"] == "error":
        return f"<pre>{html.escape(output['ename'])}: {html.escape(output['evalue'])}</pre>"
    data = output["data"]
    return "".join(data["text/html"]) if "text/html" in data else f"<pre>{html.escape(''.join(data['text/plain']))}</pre>"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the two files")
    options = parser.parse_args()
    notebook = json.loads(options.notebook.read_text(encoding="utf-8"))
    succeeded = execute(notebook)
    options.output.mkdir(parents=True, exist_ok=True)
    target = options.output / options.notebook.name
    target.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    target.with_suffix(".html").write_text(page(notebook, options.notebook.stem), encoding="utf-8")
    print(f"{target} and {target.with_suffix('.html').name}", file=sys.stderr)
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
