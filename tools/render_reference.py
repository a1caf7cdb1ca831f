"""Write docs/cli.md and docs/python.md from the program; with --check only say whether they are up to date."""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from html import escape
from importlib import import_module
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
MADE = "<!-- Made by tools/render_reference.py: do not edit. -->"

PROGRAMS = {"elastickv": "elastickv.cli:root", "elastic_kv_cli": "elastickv.cli.original:command"}
_WIDTH = 100
_VALUES = {"integer": "N", "float": "X", "text": "TEXT", "path": "FILE"}
_SECTION = re.compile(r"^(\w+)\n-{3,}\n", re.MULTILINE)

# What stands on the page of the Python reference: title -> (name that is shown, where it is defined).
PYTHON: dict[str, tuple[tuple[str, str], ...]] = {
    "Measure": (
        ("elastickv.bench", "api"),
        ("elastickv.sweep", "sweeps.api"),
        ("elastickv.compare", "reports.comparison"),
        ("elastickv.load", "api"),
    ),
    "What they return": (
        ("Measurement", "reports.measurement"),
        ("Sweep", "sweeps.table"),
        ("Comparison", "reports.comparison"),
        ("Row", "reports.change"),
    ),
    "Options and intervals": (("elastickv.measure.Options", "measure.options"), ("Interval", "measure.statistics")),
    "Recipes": (
        ("elastickv.Recipe", "recipe.recipe"),
        ("elastickv.AttentionShape", "recipe.shape"),
        ("elastickv.for_ratio", "recipe.solver"),
        ("elastickv.recipe.resolve", "recipe.resolve"),
        ("elastickv.recipe.read_ratio", "recipe.accounting"),
        ("elastickv.recipe.stored_ratio", "recipe.accounting"),
        ("elastickv.recipe.interval_bytes", "recipe.accounting"),
        ("elastickv.recipe.StepBytes", "recipe.accounting"),
        ("elastickv.recipe.predicted_loss", "recipe.losses"),
        ("elastickv.recipe.largest_ratio_scoring_every_step", "recipe.solver"),
        ("elastickv.recipe.for_ratio_by_layer", "recipe.model_solver"),
        ("elastickv.recipe.ModelCalibration", "recipe.model_calibration"),
    ),
    "In Transformers": (
        ("elastickv.transformers.ElasticCache", "transformers.cache"),
        ("elastickv.transformers.elastic", "transformers.context"),
        ("elastickv.transformers.release", "transformers.decode.seam"),
        ("elastickv.transformers.CacheReport", "transformers.report"),
    ),
    "Errors": (
        ("elastickv.UsageError", "errors"),
        ("elastickv.errors.DoesNotFit", "errors"),
        ("elastickv.errors.KernelMismatch", "errors"),
        ("elastickv.errors.NonFiniteError", "errors"),
    ),
}


def cli() -> str:
    lines = [MADE, "", "# Command line", "", *_exit_codes()]
    for name, place in PROGRAMS.items():
        module, _, attribute = place.partition(":")
        lines += _with_inner(getattr(import_module(module), attribute), name)
    return "\n".join(lines).rstrip() + "\n"


def _with_inner(command: click.Command, name: str) -> Iterator[str]:
    """Yield a command, and after a group all that are in it."""
    yield from _command(command, name)
    if isinstance(command, click.Group):
        for inner in command.list_commands(click.Context(command)):
            found = command.get_command(click.Context(command), inner)
            assert found is not None
            yield from _with_inner(found, f"{name} {inner}")


def _exit_codes() -> Iterator[str]:
    from elastickv.cli import errors

    yield f"`-h` and `--help` show the same. Exit codes: {(errors.__doc__ or '').strip().splitlines()[-1]}"
    yield ""


def _command(command: click.Command, name: str) -> Iterator[str]:
    arguments = [parameter for parameter in command.params if isinstance(parameter, click.Argument)]
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    yield f"## {name}"
    yield ""
    yield from (f"{_prose(paragraph)}\n" for paragraph in _paragraphs(command.help or ""))
    usage = [f"{a.name}".upper() + "..." * (a.nargs == -1) for a in arguments] or ["COMMAND"] * isinstance(command, click.Group)
    yield f"    {' '.join([name, '[OPTIONS]', *usage])}"
    yield ""
    if options:
        yield "| option | |"
        yield "|---|---|"
        yield from (f"| {_code(_option(option))} | {_prose(_said(option))} |" for option in options)
        yield ""


def _option(option: click.Option) -> str:
    """Return an option as it is typed. Not click's own words: they are others in each of its releases."""
    names = " / ".join(filter(None, (", ".join(option.opts), ", ".join(option.secondary_opts))))
    return names if option.is_flag else f"{names} {_VALUES[option.type.name]}"


def _said(option: click.Option) -> str:
    default = f"  [default: {option.default}]" if option.show_default and not option.is_flag else ""
    return (option.help or "") + default


def python() -> str:
    lines = [MADE, "", "# Python", ""]
    for title, entries in PYTHON.items():
        lines += [f"## {title}", ""]
        for name, module in entries:
            lines += _entry_of(name, _definition(module, name.rpartition(".")[2]))
    return "\n".join(lines).rstrip() + "\n"


def _definition(module: str, name: str) -> ast.FunctionDef | ast.ClassDef:
    """Return the code of a function or class. Read, not imported: PyTorch need not be here, nor loaded."""
    source = (ROOT / "src" / "elastickv" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    nodes = (node for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef)))
    return next(node for node in nodes if node.name == name)


def _entry_of(name: str, node: ast.FunctionDef | ast.ClassDef) -> Iterator[str]:
    yield f"### {name}"
    yield ""
    if isinstance(node, ast.FunctionDef):
        yield f"```text\n{_signature(node)}\n```"
        yield ""
    yield from _docstring(ast.get_docstring(node) or "", "")
    if isinstance(node, ast.ClassDef):
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
                yield from _member(part)


def _member(node: ast.FunctionDef) -> Iterator[str]:
    kinds = {ast.unparse(decorator) for decorator in node.decorator_list}
    kind = "property" if "property" in kinds else "class method" if "classmethod" in kinds else ""
    shown = node.name if kind == "property" else " ".join(_signature(node).split()).replace("( ", "(").replace(", )", ")")
    yield f"- `{shown}`{f' ({kind})' if kind else ''}"
    yield ""
    yield from _docstring(ast.get_docstring(node) or "", "    ")


def _signature(node: ast.FunctionDef) -> str:
    """Return how it is called; with a line for each argument where one line would be too long."""
    given, arguments = node.args, []
    plain = [argument for argument in given.args if argument.arg not in ("self", "cls")]
    defaults: list[ast.expr | None] = [None] * (len(plain) - len(given.defaults))
    arguments += [_argument(*pair) for pair in zip(plain, [*defaults, *given.defaults], strict=True)]
    if given.kwonlyargs and not given.vararg:
        arguments.append("*")
    arguments += [f"*{given.vararg.arg}"] if given.vararg else []
    arguments += [_argument(*pair) for pair in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    arguments += [f"**{given.kwarg.arg}"] if given.kwarg else []
    returns = f" -> {_annotation(node.returns)}" if node.returns else ""
    whole = f"{node.name}({', '.join(arguments)}){returns}"
    if len(whole) <= _WIDTH:
        return whole
    return f"{node.name}(\n" + "".join(f"    {argument},\n" for argument in arguments) + f"){returns}"


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    typed = f"{argument.arg}: {_annotation(argument.annotation)}" if argument.annotation else argument.arg
    return typed if default is None else f"{typed} = {ast.unparse(default)}"


def _annotation(node: ast.expr) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ast.unparse(node)


def _docstring(text: str, indent: str) -> Iterator[str]:
    """Yield a docstring as Markdown: prose, and its sections as lists."""
    pieces = _SECTION.split(text)
    yield from (f"{indent}{_prose(paragraph)}\n" for paragraph in _paragraphs(pieces[0]))
    for title, body in zip(pieces[1::2], pieces[2::2], strict=True):
        entries, _, rest = body.partition("\n\n")
        yield f"{indent}{title}:"
        yield ""
        yield from (f"{indent}- {_entry(entry)}" for entry in re.split(r"\n(?=\S)", entries.strip()))
        yield ""
        yield from (f"{indent}{_prose(paragraph)}\n" for paragraph in _paragraphs(rest))


def _entry(text: str) -> str:
    name, colon, said = " ".join(text.split()).partition(" : ")
    return f"{_code(name)}: {_prose(said)}" if colon else _prose(name)


def _paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.strip().split("\n\n") if part.strip()]


def _prose(text: str) -> str:
    """Return text with what Markdown or HTML would take for markup escaped, outside code."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    plain = (re.sub(r"([*_|\[\]])", r"\\\1", escape(part, quote=False)) for part in parts[::2])
    code = (part.replace("|", "\\|") for part in parts[1::2])
    return "".join(text for pair in zip(plain, [*code, ""], strict=True) for text in pair)


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


PAGES = {"cli.md": cli, "python.md": python}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for name, made in PAGES.items():
        path, text = DOCS / name, made()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.write_text(text, encoding="utf-8")
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run python tools/render_reference.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
