"""The command line as a target: the real `main` on arguments and files that the fuzzer chooses.

What begins after everything is parsed and checked (measuring, loading a model, probing devices) is replaced by an end: such a
run counts as accepted. Nothing else is.
"""

import contextlib
import io
import json
import os
import re
import shutil
import sys
from functools import cache
from pathlib import Path
from unittest import mock

import click

from elastickv.cli import COMMANDS, main, root
from elastickv.errors import UsageError
from tests.fuzz.source import Source, as_json, edits
from tests.fuzz.targets import _PLAN, _RECIPE_SEEDS, Target, _calibration, _documents, folder

EXITS = (0, 1, 2, 3, 4)
_VALUES = (
    *(
        "0",
        "1",
        "-1",
        "2",
        "64",
        "128",
        "1024",
        "4096",
        "1e3",
        "1.5",
        "0.5",
        "nan",
        "inf",
        "-inf",
        "1e308",
        "1" + "0" * 400,
        "²",
        "",
    ),
    *(
        "auto",
        "all",
        "none",
        "cpu",
        "cuda",
        "x",
        "bf16",
        "fp16",
        "hot",
        "cold",
        "golden",
        "speedup>=1.5,cv<=5",
        "1,2-8*2",
        "1-9+4",
    ),
    *(
        "smoke",
        "long",
        "short",
        "table",
        "json",
        "jsonl",
        "csv",
        "md",
        "html",
        "dense",
        "slower",
        "fidelity",
        "any",
        "ppl=0.5%",
    ),
    *(
        "1-1" + "0" * 400,
        "0.0001-1*1.5",
        "\x1b[31m",
        "[red]x[/]",
        "\udcff",
        "stock-quantized",
        "9.0",
        "90",
        "shape:8b",
        "a/b/c",
    ),
)
_FILES = (
    "a.json",
    "b.json",
    "s.jsonl",
    "plan.toml",
    "plan.json",
    "c.json",
    "t.txt",
    "odd.json",
    "odd.jsonl",
    "odd.toml",
    "empty",
    "folder",
    "missing.json",
    "missing/x.json",
    "loop",
    "pipe",
    "zeros",
    "noaccess.json",
    "out.json",
    "out.csv",
    "out.md",
    "out.html",
    "out.jsonl",
    "out.txt",
    "out.parquet",
    "plot.png",
    ".",
    "..",
    "n" * 300,
    "sample.safetensors",
    "m.gguf",
)
_OUTPUTS = ("out.", "plot.")


class Accepted(Exception):
    """Everything was checked, and the work would begin."""


@cache
def place() -> Path:
    """Return a folder with files to name, as the fixed ones of `_FILES` say."""
    here = folder() / "here"
    here.mkdir()
    short, model, original, _, whole, lines = _documents()
    for name, value in (("a.json", short), ("b.json", original), ("c.json", _calibration()), ("plan.json", _PLAN)):
        (here / name).write_bytes(as_json(value))
    (here / "s.jsonl").write_bytes(b"".join(as_json(line) + b"\n" for line in lines))
    (here / "plan.toml").write_text('seq = [512]\nrecipe = ["int8"]\nheads = 2\n')
    (here / "t.txt").write_text("a text that is short")
    (here / "empty").write_bytes(b"")
    (here / "m.gguf").write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 16)
    (here / "folder").mkdir()
    (here / "folder" / "m.json").write_bytes(as_json(model))
    (here / "folder" / "w.json").write_bytes(as_json(whole))
    (here / "loop").symlink_to("loop")
    (here / "zeros").symlink_to("/dev/zero")
    os.mkfifo(here / "pipe")
    (here / "sample.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    return here


@cache
def _options(name: str) -> tuple[str, ...]:
    command = root.get_command(click.Context(root), name)
    if isinstance(command, click.Group):
        inner = [command.get_command(click.Context(command), one) for one in command.list_commands(click.Context(command))]
        return tuple(text for one in inner for parameter in one.params for text in (*parameter.opts, *parameter.secondary_opts))
    return tuple(text for parameter in command.params for text in (*parameter.opts, *parameter.secondary_opts))


def arguments(source: Source) -> list[str]:
    """Return a command line, and write the file that it may name."""
    if source.below(8) == 0:
        document = source.pick((*_documents()[:4], _PLAN, _calibration()))
        data = as_json(edits(document, source, 4))
        for name in ("odd.json", "odd.jsonl"):
            (place() / name).write_bytes(data)
        (place() / "odd.toml").write_bytes(source.rest())
    name = source.pick((*COMMANDS, *COMMANDS, "compare", "compare", "sweep", "--version", "-h", "frob"))
    given = [name]
    if name == "compare":
        given += [source.pick(_FILES), source.pick(_FILES)]
    elif name == "sweep":
        given += ["-o", source.pick(("out.jsonl", "s.jsonl", *_FILES))]
    elif name == "bench" and source.below(16):
        # Solving `auto` takes most of the time, and is another target's.
        given += ["--recipe", source.pick(("int8", "stride=2", "int4,pages=1/4", "reuse,anchor_every=4"))]
    elif name == "report":
        given += [source.pick(_FILES), "-o", source.pick(("out.html", "out.md", *_FILES))]
    elif name == "baseline":
        given += [source.pick(("transformers", "gguf", "frob")), source.pick(("m.gguf", "folder", *_VALUES))]
    elif name in ("eval", "calibrate", "run"):
        given.append(source.pick(("m.gguf", "folder", "missing.gguf", *_VALUES)))
    known = _options(name) if name in COMMANDS else ("--help",)
    while source and len(given) < 14:
        kind = source.below(8)
        if kind < 5:
            given.append(source.pick(known))
            given.append(_value(source))
        else:
            given.append(source.pick(known) if kind == 5 else _value(source))
    # A process takes no zero bytes. Slashes of the fuzzer's own might name any file of this machine.
    return [argument.replace("\0", "") for argument in given]


def _value(source: Source) -> str:
    kind = source.below(8)
    if kind < 3:
        return source.pick(_VALUES)
    if kind < 6:
        return source.pick(_FILES)
    return source.pick(_RECIPE_SEEDS).decode() if kind == 6 else re.sub(r"[/~]", "_", source.text())


def call(given: list[str]) -> tuple[int, str, str]:
    """Run the program in this process; return its exit code and what it printed."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors=how) for how in ("strict", "backslashreplace"))
    typed = io.TextIOWrapper(io.BytesIO(b""), "utf-8")
    before = Path.cwd()
    os.chdir(place())
    try:
        with mock.patch.multiple(sys, argv=["elastickv", *given], stdin=typed, stdout=out, stderr=err):
            try:
                main()
                code = 0
            except SystemExit as stop:
                code = stop.code or 0
        out.flush()
        err.flush()
        return code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()
    finally:
        os.chdir(before)
        _tidy()


def _tidy() -> None:
    kept = {*_FILES} - {name for name in _FILES if name.startswith(_OUTPUTS)}
    for name in os.listdir(place()):
        if name not in kept:
            path = place() / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if (place() / "s.jsonl").stat().st_size != _sweep_bytes():
        (place() / "s.jsonl").write_bytes(b"".join(as_json(line) + b"\n" for line in _documents()[-1]))


@cache
def _sweep_bytes() -> int:
    return sum(len(as_json(line)) + 1 for line in _documents()[-1])


@contextlib.contextmanager
def no_work():
    """End a run where work would begin."""
    import elastickv.api
    import elastickv.backends
    import elastickv.benchmark
    import elastickv.benchmark.doctor
    import elastickv.benchmark.environment
    import elastickv.evaluation.calibrate
    import elastickv.evaluation.evaluate
    import elastickv.html_report.report
    import elastickv.model_benchmark.bench as model_bench
    import elastickv.model_benchmark.model_source
    import elastickv.model_benchmark.presets
    import elastickv.sweeps.journal
    import elastickv.sweeps.sweep
    import elastickv.transformers.model_loading

    def begins(*_, **__):
        raise Accepted

    environment = elastickv.benchmark.environment.environment()
    with contextlib.ExitStack() as stack:
        for module, name, stand_in in (
            (elastickv.api, "run", begins),
            (elastickv.model_benchmark.presets, "gguf_baseline", begins),
            (elastickv.model_benchmark.presets, "transformers_baseline", begins),
            (elastickv.html_report.report.Report, "save", begins),
            (elastickv.sweeps.sweep, "measure", begins),
            (elastickv.sweeps.journal, "environment", lambda: environment),  # asks git each time
            (elastickv.transformers.model_loading, "load_model", begins),
            (elastickv.model_benchmark.model_source, "open_model", begins),
            (model_bench, "measure", begins),
            (elastickv.benchmark.doctor, "findings", begins),
            (elastickv.backends, "load", begins),
        ):
            stack.enter_context(mock.patch.object(module, name, stand_in))
        yield


_PATCHED = contextlib.ExitStack()


def work_again() -> None:
    """Let runs of this process do work again."""
    _PATCHED.close()
    _PATCHED.entered = False


def one(data: bytes) -> None:
    """Run the program: an exit code that is documented, one line of error for bad input, and no control characters."""
    from tests.fuzz.targets import _few_cells

    if not getattr(_PATCHED, "entered", False):
        _PATCHED.enter_context(no_work())
        _PATCHED.entered = True
    given = arguments(Source(data))
    with _few_cells():
        try:
            code, out, err = call(given)
        except Accepted:
            return
    assert code in EXITS, f"exit {code}"
    assert "Traceback" not in err
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", out + err), "control characters"
    if code == 2:
        said = [line for line in err.splitlines() if ": error: " in line]
        assert len(said) == 1 or "Usage:" in err, "no error, or several"
        raise UsageError("refused")
    assert not out.startswith("{") or json.loads(out.splitlines()[0] if "jsonl" in given else out) is not None


_SEEDS = tuple(bytes([a, b]) + bytes(range(c, c + 40)) for a in range(1, 8) for b in range(0, 16, 3) for c in (0, 90))
TARGET = Target(one, _SEEDS, (), 0, longest=200)
