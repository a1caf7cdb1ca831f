"""The order of imports, the size of folders, the names: what docs/architecture.md and CONTRIBUTING.md say of the tree."""

import ast
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / "elastickv"
# Lowest first. Packages of one rung may import each other; no two modules may import each other, directly or around.
RUNGS = [
    ("errors", "version"),
    ("inputs",),
    ("recipe",),
    ("kvcache",),
    ("backends",),
    ("benchmark", "measure", "transformers", "vllm"),
    ("results", "evaluation"),
    ("html_report", "model_benchmark"),
    ("sweeps", "api", "lm_eval"),
    ("cli",),
]
RUNG = {package: rung for rung, packages in enumerate(RUNGS) for package in packages}
MOST_FILES = 25
FILES = sorted(SOURCE.rglob("*.py"))
# A command's file is named as the command; the backends mirror each other.
COMMANDS = {"baseline", "bench", "calibrate", "compare", "doctor", "eval", "report", "run", "sweep"}
REPEATED_NAMES = {
    "attention": {"kvcache", "transformers"},
    "backend": {"backends/cpu", "backends/cuda"},
    "block_kernels": {"backends/cpu/blocks", "backends/cuda"},
    "cache": {"backends/cpu", "backends/cuda", "transformers"},
    "ceilings": {"backends/cpu", "backends/cuda"},
    "device": {"backends/cpu", "backends/cuda"},
    "editing": {"backends/cpu", "backends/cuda"},
    "programs": {"backends/cpu", "backends/cuda"},
    "protocol": {"backends", "kvcache"},
    "readback": {"backends/cpu", "backends/cuda"},
    "storage": {"backends/cpu", "backends/cuda"},
}
# Public attributes, documented in docs/python.md under these names, and keys of files: where they may be defined.
PUBLIC_NAMES = {
    "html_report/report.py": {"facts"},
    "html_report/saving.py": {"facts"},
    "results/kinds/evaluation_result.py": {"found"},
    "transformers/cache.py": {"take_back"},
    "vllm/window_manager.py": {"apply_admission_cap"},  # these are vLLM's names
    "vllm/window_spec.py": {"max_admission_blocks_per_request"},
}


def module_name(path):
    parts = ("elastickv", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def trees():
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imported(tree):
    """Yield the modules that a tree imports, wherever the import stands; what is imported may be a module's name or in one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from {name if name in MODULES else node.module for name in names}


def own_imports():
    return {name: {module for module in imported(tree) if module in MODULES} - {name} for name, tree in trees().items()}


def cycles(graph):
    """Return the strongly connected components of more than one node (Tarjan 1972)."""
    index, low, stack, components = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for following in sorted(graph[node]):
            if following not in index:
                visit(following)
                low[node] = min(low[node], low[following])
            elif following in stack:
                low[node] = min(low[node], index[following])
        if low[node] == index[node]:
            component = set()
            while node not in component:
                component.add(stack.pop())
            if len(component) > 1:
                components.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return components


def test_a_cycle_is_seen():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert cycles({"a": {"b"}, "b": set()}) == []


def test_no_modules_import_each_other():
    assert cycles(own_imports()) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_downward(path):
    here = path.relative_to(SOURCE).with_suffix("").parts[0]
    if here in ("__init__", "__main__"):
        return
    assert here in RUNG, f"say in RUNGS where {here} stands"
    for module in imported(ast.parse(path.read_text(encoding="utf-8"))):
        parts = module.split(".")
        if parts[0] == "elastickv":
            assert len(parts) > 1, f"{here} imports the package itself: import the module that defines the name"
            assert RUNG[parts[1]] <= RUNG[here], f"{here} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_only_peers_import_torch(path):
    allowed = path.relative_to(SOURCE).as_posix() in (
        "benchmark/contenders/flash_attention.py",
        "benchmark/contenders/flash_infer.py",
        "benchmark/contenders/flex_attention.py",
        "benchmark/contenders/torch_sdpa.py",
        "benchmark/contenders/torch_timing.py",
    )
    allowed = allowed or path.relative_to(SOURCE).parts[0] in (
        "transformers", "evaluation", "lm_eval", "model_benchmark", "vllm",
    )  # fmt: skip
    modules = imported(ast.parse(path.read_text(encoding="utf-8")))
    assert allowed or not {module.split(".")[0] for module in modules} & {"flashinfer", "torch", "vllm"}


@pytest.mark.parametrize("path", sorted((SOURCE / "benchmark" / "contenders").glob("*.py")), ids=lambda path: path.name)
def test_peers_import_torch_only_when_they_run(path):
    loaded = [
        node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    words = [word.split(".")[0] for node in loaded for word in ast.unparse(node).split()]
    assert not {"flashinfer", "torch", "vllm"} & set(words)


@pytest.mark.parametrize("path", [p for p in FILES if "backends" not in p.parts], ids=lambda path: path.name)
def test_device_libraries_stay_in_the_back_ends(path):
    modules = imported(ast.parse(path.read_text(encoding="utf-8")))
    assert not {module.split(".")[0] for module in modules} & {"numba", "cuda", "llvmlite"}


def test_a_cache_is_reached_through_the_protocol_above_the_back_ends():
    concrete = re.compile(r"\b(CpuCache|CudaCache|ReferenceCache)\b")
    above = [path for path in FILES if RUNG.get(path.relative_to(SOURCE).parts[0], 0) > RUNG["backends"]]
    assert [str(path.relative_to(SOURCE)) for path in above if concrete.search(path.read_text(encoding="utf-8"))] == []


def test_no_folder_is_crowded():
    sizes = Counter(path.parent.relative_to(SOURCE).as_posix() for path in FILES)
    assert {folder: count for folder, count in sizes.items() if count > MOST_FILES} == {}


def test_no_class_name_stands_twice():
    homes = defaultdict(list)
    for name, tree in trees().items():
        for node in ast.walk(tree):  # nested classes too; a leading underscore makes no other name
            if isinstance(node, ast.ClassDef):
                homes[node.name.lstrip("_")].append(name)
    repeated = {name: sorted(modules) for name, modules in homes.items() if len(modules) > 1}
    assert repeated == {}


def test_a_file_name_stands_twice_only_where_packages_mirror_each_other():
    folders = defaultdict(set)
    for path in FILES:
        if path.stem not in ("__init__", "__main__"):
            folders[path.stem].add(path.parent.relative_to(SOURCE).as_posix())
    repeated = {
        name: where - ({"cli"} if name in COMMANDS else set())
        for name, where in folders.items()
        if len(where - ({"cli"} if name in COMMANDS else set())) > 1
    }
    assert repeated == REPEATED_NAMES


def retired():
    lines = (TESTS / "retired_words.txt").read_text(encoding="utf-8").splitlines()
    return {line.partition(":")[0] for line in lines if line and not line.startswith("#")}


def parts_of(name):
    return [part.lower() for part in re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+", name)]


def retired_in(name, words):
    """Return the retired words that a name contains, as one of its parts or as several in a row."""
    padded = f"_{'_'.join(parts_of(name))}_"
    return {word for word in words if f"_{word}_" in padded}


def defined(tree):
    """Yield the names that a tree defines: modules' members, parameters, attributes and local variables."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name


def test_a_retired_word_is_seen():
    names = set(defined(ast.parse("class ToldOf:\n    def f(self, kept_rows):\n        self.take_back_all = found = 1\n")))
    assert {name for name in names if retired_in(name, retired())} == {"ToldOf", "kept_rows", "take_back_all", "found"}
    assert not retired_in("foundation", retired())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_names_are_the_fields_words(path):
    words = retired()
    names = {*path.relative_to(SOURCE).with_suffix("").parts, *defined(ast.parse(path.read_text(encoding="utf-8")))}
    names -= PUBLIC_NAMES.get(path.relative_to(SOURCE).as_posix(), set())
    assert {name: found for name in sorted(names) if (found := retired_in(name, words))} == {}


@pytest.mark.parametrize("package", sorted(p.name for p in SOURCE.iterdir() if (p / "__init__.py").exists()))
def test_tests_mirror_the_packages(package):
    assert (TESTS / package).is_dir(), f"tests/{package} is missing"
