"""No message that the library raises names a flag: it names the parameter, and `elastickv.cli.flags` shows the flag."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "elastickv"
FILES = sorted(path for path in SOURCE.rglob("*.py") if path.relative_to(SOURCE).parts[0] != "cli")
_FLAG = re.compile(r"(?<![\w`-])--[a-z][a-z-]*")
# A whole command line, to be typed: `pip install --force-reinstall numba`, `elastickv calibrate MODEL --text FILE`.
_COMMAND_LINE = re.compile(r"\b(elastickv|pip|git) [^;:]*")


def texts(node):
    """Yield the texts of an expression or a module, an f-string as one; docstrings are none."""
    skipped = set()
    for each in ast.walk(node):
        if isinstance(each, (ast.Module, ast.ClassDef, ast.FunctionDef)) and each.body and isinstance(each.body[0], ast.Expr):
            skipped.add(each.body[0].value)
        elif isinstance(each, ast.JoinedStr):
            skipped.update(each.values)
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in each.values)
        elif isinstance(each, ast.Constant) and isinstance(each.value, str) and each not in skipped:
            yield each.value


def flags(node):
    """Return the flags in the texts of a node that are part of no whole command line."""
    return {flag for text in texts(node) for flag in _FLAG.findall(_COMMAND_LINE.sub("", text))}


def module_names(tree):
    """Return name -> the expressions that a module assigns to it, or that its function of this name returns."""
    named = defaultdict(list)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            named[node.name] += [each.value for each in ast.walk(node) if isinstance(each, ast.Return) and each.value]
            named[node.name] += [value for values in local_names(node).values() for value in values]
    return named | local_names(ast.Module(tree.body, []), deep=False)


def local_names(scope, deep=True):
    """Return name -> the expressions that a function, or a module outside its functions, assigns to it."""
    named = defaultdict(list)
    for node in ast.walk(scope) if deep else scope.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        named[name.id].append(node.value)
    return named


def imported(tree, modules):
    """Return name -> what a name that is imported from another module of the library stands for."""
    return {
        alias.asname or alias.name: modules[node.module][alias.name]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in modules
        for alias in node.names
        if alias.name in modules[node.module]
    }


def raised_flags(tree, modules):
    """Return the flags in raised expressions and in what their variables, constants and functions stand for."""
    outer = imported(tree, modules) | module_names(tree)
    scopes = [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))]
    found = set()
    for scope in scopes:
        named = outer | local_names(scope, deep=scope is not tree)
        for node in ast.walk(scope) if scope is not tree else scope.body:
            if isinstance(node, ast.Raise) and node.exc is not None:
                waiting, seen = [node.exc], set()
                while waiting:
                    part = waiting.pop()
                    found |= flags(part)
                    names = {each.id for each in ast.walk(part) if isinstance(each, ast.Name)} - seen
                    seen |= names
                    waiting += [value for name in names for value in named.get(name, [])]
    return found


def dotted(path):
    return ".".join(("elastickv", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


@pytest.fixture(scope="module")
def trees():
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


# Options of other programs.
_OTHERS = {
    "backends/cuda/compiler.py": {
        "--gpu-architecture",
        "--std",
        "--ptxas-options",
        "--no-cache",
        "--include-path",
        "--define-macro",
    },
    "benchmark/environment.py": {"--porcelain"},
    "html_report/charts/style.py": {"--ink", "--muted", "--grid", "--paper", "--hue-"},
    "vllm/startup_checks.py": {
        "--attention-backend",
        "--kv-cache-dtype",
        "--kv-cache-dtype-skip-layers",
        "--attention-config",
        "--additional-config",
        "--language-model-only",
    },
    "vllm/teacher_forcing/engine_environment.py": {"--query-gpu", "--format"},
}
# Notes that results hold: they stay as they are.
_IN_RESULTS = {
    "benchmark/warnings.py": {"--paired-baseline"},
    "html_report/cost_sections.py": {"--model", "--needle"},
    "model_benchmark/gguf.py": {"--scored"},
    "model_benchmark/bench.py": {"--scored"},
    "results/compare/comparison.py": {"--control", "--dense"},
    "results/compare/matching.py": {"--paired-baseline"},
}


def test_no_raised_message_names_a_flag(trees):
    modules = {dotted(path): module_names(tree) for path, tree in trees.items()}
    for path, tree in trees.items():
        assert raised_flags(tree, modules) <= _OTHERS.get(path.relative_to(SOURCE).as_posix(), set()), path


def test_no_other_text_of_the_library_names_a_flag(trees):
    for path, tree in trees.items():
        name = path.relative_to(SOURCE).as_posix()
        assert flags(tree) <= _OTHERS.get(name, set()) | _IN_RESULTS.get(name, set()), name


@pytest.mark.parametrize(
    "code",
    [
        'raise UsageError("--seq is too long")',
        'raise UsageError(f"--seq={seq} is too long")',
        'raise UsageError("it is too long: " + "give a shorter --seq")',
        'REMEDY = "use --backend cpu"\nraise UsageError(f"no device: {REMEDY}")',
        'def check(seq):\n    """Docstrings may say --seq."""\n    reason = "a shorter --seq"\n    raise UsageError(reason)',
        'def unmet():\n    return "give a smaller --compress"\nraise UsageError(unmet())',
        'raise UsageError("elastickv said: give a smaller --compress")',
    ],
)
def test_a_flag_in_a_raised_message_is_seen(code):
    assert raised_flags(ast.parse(code), {})


@pytest.mark.parametrize(
    "code",
    [
        'raise UsageError("give a shorter `seq`; an em--dash is none")',
        'raise UsageError("it is broken: pip install --force-reinstall numba")',
        'def check():\n    """Docstrings may say --seq."""\nraise UsageError(check())',
    ],
)
def test_what_is_no_flag_of_ours_is_none(code):
    assert not raised_flags(ast.parse(code), {})
