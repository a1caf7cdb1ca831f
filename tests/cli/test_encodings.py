"""Output that the terminal cannot encode and arguments that are not valid Unicode: never a traceback, no result lost."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from elastickv.cli import COMMANDS, root, standard_streams
from elastickv.cli.click_options import UnicodeText
from tests.fuzz.command_line import Accepted, no_work

ROOT = Path(__file__).parents[2]
BENCH = ["bench", "--reps=4", "--warmup=1", "--inner-loops=2", "--cache=hot", "--seq=340", "--heads=2", "--compress=1.3"]
NAME = "\u65e5\u672c \u00e9"
INVALID = ("a\udcffb", "\ud800", "\u65e5\u672c \u00e9", "\U0001f600" * 100, "back\\slash\\", "\\")
MINIMAL = {
    "run": ["shape:tiny", "--prompt=x"],
    "eval": ["no-such-folder/x/y"],
    "calibrate": ["no-such-folder/x/y"],
    "sweep": ["--output=x.jsonl"],
    "compare": ["a.json", "b.json"],
    "report": ["a.json"],
}
ENCODINGS = [("utf-8", NAME), ("ascii", "?? ?"), ("latin-1", "?? \u00e9"), ("cp1252", "?? \u00e9")]


@pytest.fixture
def terminal(monkeypatch):
    """Make standard output and error streams of an encoding; return them."""

    def make(encoding):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding, errors=errors) for errors in ("strict", "backslashreplace")]
        for name, stream in zip(("stdout", "stderr"), streams, strict=True):
            monkeypatch.setattr(sys, name, stream)
        standard_streams.prepare()
        return streams

    return make


def written(stream, encoding):
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize(("encoding", "shown"), ENCODINGS)
def test_what_a_terminal_cannot_encode_is_replaced(terminal, encoding, shown):
    out, err = terminal(encoding)
    click.echo(NAME)
    print(NAME)
    sys.stdout.write(NAME + "\udcff")
    click.echo(NAME, err=True)
    assert written(out, encoding) == f"{shown}\n{shown}\n{shown}?"
    assert written(err, encoding).encode(encoding).startswith(NAME.encode(encoding, "backslashreplace"))


@pytest.mark.parametrize(("encoding", "shown"), ENCODINGS)
def test_a_text_is_streamed_with_replacements_and_saved_whole(terminal, encoding, shown):
    import torch

    from elastickv.cli.streaming import LiveText

    class Tokenizer:
        def decode(self, ids, **_):
            return "".join(NAME[number] for number in ids)

    out, _ = terminal(encoding)
    with LiveText(Tokenizer()) as live:
        for number in range(len(NAME)):
            live.add(torch.tensor([number]))
    assert live.text == NAME and written(out, encoding) == shown + "\n"


def options():
    """Yield (command, flag) for every option and argument that takes a text."""
    for name in COMMANDS:
        context = click.Context(root)
        command = root.get_command(context, name)
        inner = [(name, command)]
        if isinstance(command, click.Group):
            inner = [(f"{name} {each}", command.get_command(context, each)) for each in command.list_commands(context)]
        for path, each in inner:
            for parameter in each.params:
                if isinstance(parameter, click.Argument):
                    yield path, None
                elif not parameter.is_flag:
                    yield path, max(parameter.opts, key=len)


@pytest.mark.parametrize(("command", "flag"), list(options()), ids=str)
def test_any_text_in_any_option_is_accepted_or_refused_in_one_line(command, flag, elastickv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    minimal = MINIMAL.get(command, ["shape:tiny"] if " " in command else [])
    with no_work():
        for value in INVALID:
            arguments = [value] * max(1, len(minimal)) if flag is None else [*minimal, f"{flag}={value}"]
            try:
                done = elastickv(*command.split(), *arguments)
            except Accepted:
                continue
            assert done.returncode == 2, (value, done.stderr)
            assert "Traceback" not in done.stderr and done.stderr.count(": error: ") == 1
            done.stderr.encode("utf-8")


@pytest.mark.parametrize("text", ["plain", NAME])
def test_an_argument_in_utf8_is_read_whatever_the_locale_says(text):
    assert UnicodeText().convert(text, None, None) == text
    escaped = text.encode("utf-8").decode("ascii", "surrogateescape")
    assert UnicodeText().convert(escaped, None, None) == text


def test_a_prompt_that_is_no_unicode_is_one_line(elastickv, folder):
    done = elastickv("run", folder, "--prompt=ab\udcff")
    assert done.returncode == 2 and done.stdout == ""
    assert "--prompt" in done.stderr and "not valid Unicode (character 3)" in done.stderr


@pytest.mark.parametrize(
    ("encoding", "environment"),
    [
        ("ascii", {"PYTHONIOENCODING": "ascii"}),
        ("ascii", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
        ("cp1252", {"PYTHONIOENCODING": "cp1252"}),
    ],
)
def test_the_program_writes_its_files_in_utf8_on_any_terminal(tmp_path, encoding, environment):
    folder = tmp_path / NAME
    folder.mkdir()
    target, page = folder / "\u672c.json", folder / "\u672c.html"
    environment = os.environ | environment | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    main = [sys.executable, Path(__file__).with_name("reference_bench.py")]
    done = subprocess.run([*main, *BENCH, f"--output={target}"], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(target.read_text(encoding="utf-8"))["complete"]
    done.stdout.decode(encoding)
    shown = subprocess.run(
        [*main, "report", target, "--title", NAME, "-o", page], env=environment, capture_output=True, check=False
    )
    assert shown.returncode == 0, shown.stderr
    assert NAME in page.read_text(encoding="utf-8")
    shown.stdout.decode(encoding)
