"""What the documents say is what the files hold."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_figures_in_the_documents_are_those_of_the_result_files():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "render_figures.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        assert target.startswith("http") or (document.parent / target).exists(), target


def test_every_bench_option_in_the_readme_exists():
    from elastickv.cli.bench import command

    known = {name for parameter in command.params for name in parameter.opts + parameter.secondary_opts}
    commands = re.findall(r"^(?:.*\b)?(?:elastickv bench|elastic_kv_cli)(.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    used = {option for line in commands for option in re.findall(r"(--[a-z-]+)", line.partition("#")[0])}
    assert used
    assert used <= known


def test_the_commands_of_the_comparison_and_its_workflow_exist():
    from elastickv.cli.bench import command as bench
    from elastickv.cli.compare import command as compare

    workflow = (ROOT / "docs" / "workflows" / "performance.yml").read_text(encoding="utf-8").replace("\\\n", " ")
    text = workflow + (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")
    for command in (bench, compare):
        lines = re.findall(rf"elastickv {command.name} (.*)$", workflow, re.MULTILINE)
        assert lines
        lines += re.findall(rf"^elastickv {command.name} (.*)$", text, re.MULTILINE)
        known = {name for parameter in command.params for name in parameter.opts + parameter.secondary_opts}
        assert {option for line in lines for option in re.findall(r"(--[a-z-]+)", line)} <= known
