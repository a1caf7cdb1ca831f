"""A short run of every fuzz target: the inputs that are kept, and mutations of them; and a guided run where atheris is."""

import json
import os
import random
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.fuzz import command_line
from tests.fuzz.__main__ import ALL, CORPORA, corpus
from tests.fuzz.findings import Findings, quiet
from tests.fuzz.targets import Target

SECONDS = 0.4  # of mutations a target, and at least so many of them:
LEAST = 20
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def others_work():
    """What ends the command line's runs must not end those of other tests."""
    yield
    command_line.work_again()


def mutated(target: Target, data: bytes, rng: random.Random) -> bytes:
    """Return an input with a few bytes changed, put in or left out."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(4)
        if kind == 0 and target.words:
            changed[at:at] = rng.choice(target.words).encode()
        elif kind == 1:
            changed[at:at] = rng.randbytes(rng.randint(1, 6))
        elif kind == 2:
            del changed[at : at + rng.randint(1, 4)]
        elif at < len(changed):
            changed[at] = rng.randrange(256)
    return bytes(changed[: target.longest])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ALL)
def test_nothing_but_the_documented_error_comes_out(name):
    quiet()
    findings, inputs, rng = Findings(ALL[name]), corpus(name), random.Random(0)
    for data in inputs:
        findings.run(data)
    end, tried = time.monotonic() + SECONDS, 0
    while tried < LEAST or time.monotonic() < end:
        findings.run(mutated(ALL[name], rng.choice(inputs), rng))
        tried += 1
    assert not findings.found, f"python -m tests.fuzz --only {name}: {findings.found}"
    assert findings.refused or name == "kernel-cache"
    assert findings.refused < findings.runs, "no input is accepted: the target tests nothing"


def test_a_finding_is_kept_and_told():
    """A target that breaks must not pass: this one divides by zero, and answers another input in two lines."""

    def one(data: bytes) -> None:
        if data == b"lines":
            raise ValueError("a\nb")
        1 / len(data)

    findings = Findings(Target(one, (b"",), documented=(ValueError,)))
    assert [findings.run(data) for data in (b"x", b"", b"", b"lines")] == [False, True, False, True]
    assert next(kind.partition(" in ")[0] for kind in findings.found) == "ZeroDivisionError"
    assert "several lines" in list(findings.found)[1]


def test_the_kept_inputs_are_few():
    assert CORPORA.stat().st_size < 500_000
    assert set(json.loads(CORPORA.read_text(encoding="utf-8"))) <= set(ALL)


@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is published for Linux on x86-64 only")
def test_a_guided_run_counts_what_it_did(tmp_path):
    command = [
        sys.executable,
        "-m",
        "tests.fuzz",
        "--runs",
        "20000",
        "--only",
        "recipe",
        "--output",
        str(tmp_path / "told.json"),
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "told.json").read_text(encoding="utf-8"))
    assert told["executions_in_process"] == told["targets"]["recipe"]["executions"] > 5000
    assert told["targets"]["recipe"]["edges"] > 20
    assert not told["targets"]["recipe"]["findings"]
