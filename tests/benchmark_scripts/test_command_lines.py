"""How scripts end: with the status of `main`, or with one line if it was asked for what is not accepted."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# Measures what a first import costs, and so imports nothing of the package.
ALONE = {"cpu_pages.py"}
SCRIPTS = [path for path in sorted(BENCHMARKS.glob("*.py")) if "__main__" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.name not in ALONE], ids=lambda path: path.stem)
def test_a_script_ends_by_exit_with(path):
    *_, last = ast.parse(path.read_text(encoding="utf-8")).body
    assert isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'"
    assert ast.unparse(last.body[-1]) == "exit_with(main)"


def test_what_is_not_accepted_ends_in_one_line(tmp_path):
    command = [sys.executable, BENCHMARKS / "frontier.py", tmp_path / "no.gguf", "--output", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith(f"frontier.py: model {tmp_path / 'no.gguf'} does not exist: give ")
    assert not (tmp_path / "out").exists()
