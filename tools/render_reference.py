"""Write docs/cli.md and docs/python.md from the program; with --check only report whether they are up to date."""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from html import escape
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import click

import elastickv

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
MADE = "<!-- Made by tools/render_reference.py: do not edit. -->"

PROGRAMS = {"elastickv": "elastickv.cli:root", "elastic_kv_cli": "elastickv.cli.elastic_kv_cli:command"}
_WIDTH = 100
PUBLIC = ("elastickv", "elastickv.errors", "elastickv.benchmark", "elastickv.recipe", "elastickv.transformers")
_VALUES = {"integer": "N", "float": "X", "text": "TEXT", "path": "FILE"}
_SECTION = re.compile(r"^(\w+)\n-{3,}\n", re.MULTILINE)

# Entries of the Python reference in addition to the functions of the package and the classes that they return.
PYTHON: dict[str, tuple[str, ...]] = {
    "Options, rows, intervals": (
        "elastickv.benchmark.Options",
        "elastickv.results.compare.change.Row",
        "elastickv.benchmark.stats.intervals.Interval",
    ),
    "Recipes": (
        "elastickv.Recipe",
        "elastickv.AttentionShape",
        "elastickv.for_ratio",
        *(
            f"elastickv.recipe.{name}"
            for name in (
                "resolve",
                "read_ratio",
                "stored_ratio",
                "interval_bytes",
                "StepBytes",
                "predicted_loss",
                "largest_ratio_scoring_every_step",
                "for_ratio_by_layer",
                "for_stored_bits",
                "stored_bits",
                "ModelCalibration",
            )
        ),
    ),
    "In Transformers": tuple(
        f"elastickv.transformers.{name}" for name in ("ElasticCache", "elastic", "release", "CacheReport")
    ),
    "Errors": (
        "elastickv.UsageError",
        *(f"elastickv.errors.{name}" for name in ("DoesNotFit", "KernelMismatch", "NonFiniteError")),
    ),
}


def cli() -> str:
    intro = "`-h` and `--help` print the same text. [Exit codes](failures.md#exit-codes) are the same for all commands."
    lines = [MADE, "", "# Command line", "", intro, ""]
    for name, place in PROGRAMS.items():
        module, _, attribute = place.partition(":")
        command = getattr(import_module(module), attribute)
        lines += _commands(command, name)
    return "\n".join(lines).rstrip() + "\n"


def _commands(command: click.Command, name: str) -> Iterator[str]:
    """Yield the lines of a command; of a group, also those of its commands."""
    yield from _command(command, name)
    if isinstance(command, click.Group):
        context = click.Context(command)
        for inner in command.list_commands(context):
            subcommand = command.get_command(context, inner)
            assert subcommand is not None
            yield from _commands(subcommand, f"{name} {inner}")


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
        yield from (f"| {_code(_option(option))} | {_prose(_help(option))} |" for option in options)
        yield ""


def _option(option: click.Option) -> str:
    """Return an option as it is typed. Click's own text differs between its releases."""
    names = " / ".join(filter(None, (", ".join(option.opts), ", ".join(option.secondary_opts))))
    return names if option.is_flag else f"{names} {_VALUES[option.type.name]}"


def _help(option: click.Option) -> str:
    default = f"  [default: {option.default}]" if option.show_default and not option.is_flag else ""
    return (option.help or "") + default


def python() -> str:
    lines = [MADE, "", "# Python", ""]
    functions = [
        f"elastickv.{name}" for name in elastickv.__all__ if name.islower() and name not in ("for_ratio", "__version__")
    ]
    pages = {"Measure": functions, "What they return": list(_returned(functions))} | PYTHON
    for title, names in pages.items():
        lines += [f"## {title}", ""]
        for name in names:
            lines += _entry_of(name, _definition(name)[1])
    return "\n".join(lines).rstrip() + "\n"


def _definition(qualified: str) -> tuple[str, ast.FunctionDef | ast.ClassDef]:
    """Return the module that defines a function or class, and its code. Modules that need PyTorch are not imported."""
    module, _, name = qualified.rpartition(".")
    home = import_module(module)
    homes = getattr(home, "_HOMES", {})
    place = homes[name] if name in homes else getattr(home, name).__module__
    place = place if place.startswith("elastickv") else f"{module}.{place}"
    spec = find_spec(place)
    assert spec is not None and spec.origin is not None
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return place, node
    return _definition(f"{getattr(import_module(place), name).__module__}.{name}")


def _returned(functions: list[str]) -> Iterator[str]:
    """Yield the classes that functions return, each once."""
    seen = set()
    for function in functions:
        place, node = _definition(function)
        assert isinstance(node, ast.FunctionDef) and node.returns is not None
        for name in re.findall(r"\w+", _annotation(node.returns)):
            if name not in seen:
                seen.add(name)
                yield f"{getattr(import_module(place), name).__module__}.{name}"


def _entry_of(name: str, node: ast.FunctionDef | ast.ClassDef) -> Iterator[str]:
    public = name.rpartition(".")[0] in PUBLIC
    yield f"### {name if public else node.name}"
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
    kind = "property" if {"property", "cached_property"} & set(kinds) else "class method" if "classmethod" in kinds else ""
    shown = node.name if kind == "property" else " ".join(_signature(node).split()).replace("( ", "(").replace(", )", ")")
    yield f"- `{shown}`{f' ({kind})' if kind else ''}"
    yield ""
    yield from _docstring(ast.get_docstring(node) or "", "    ")


def _signature(node: ast.FunctionDef) -> str:
    """Return the signature; with one line per argument if it does not fit one line."""
    parameters, arguments = node.args, []
    plain = [argument for argument in parameters.args if argument.arg not in ("self", "cls")]
    defaults: list[ast.expr | None] = [None] * (len(plain) - len(parameters.defaults))
    arguments += [_argument(*pair) for pair in zip(plain, [*defaults, *parameters.defaults], strict=True)]
    if parameters.kwonlyargs and not parameters.vararg:
        arguments.append("*")
    arguments += [f"*{parameters.vararg.arg}"] if parameters.vararg else []
    arguments += [_argument(*pair) for pair in zip(parameters.kwonlyargs, parameters.kw_defaults, strict=True)]
    arguments += [f"**{parameters.kwarg.arg}"] if parameters.kwarg else []
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
    name, colon, description = " ".join(text.split()).partition(" : ")
    return f"{_code(name)}: {_prose(description)}" if colon else _prose(name)


def _paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.strip().split("\n\n") if part.strip()]


def _prose(text: str) -> str:
    """Return text with Markdown and HTML markup escaped, except in code."""
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
