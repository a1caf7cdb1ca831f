"""Parameters that a message of the library names are shown as the flags of the command that was typed."""

import warnings

import click
import pytest

from elastickv.cli import COMMANDS, root
from elastickv.cli.error_handling import exit_with
from elastickv.cli.flags import SYNONYMS, flags_of, with_flags
from elastickv.errors import UsageError


def command(name):
    return root.get_command(click.Context(root), name)


@pytest.mark.parametrize(
    ("name", "message", "shown"),
    [
        ("bench", "`seq`=0 is out of range", "--seq=0 is out of range"),
        ("bench", "give a shorter `context` or `capacity`", "give a shorter --context or --context"),
        ("bench", "use `backend=cpu`, add `paired=True`", "use --backend cpu, add --paired-baseline"),
        ("bench", "`time_limit_s`=5, `until_ci_percent`, `graphs=False`", "--time-limit=5, --until-ci, --no-graphs"),
        ("bench", "no file of `elastickv bench`, `quux` or `quux=1`", "no file of `elastickv bench`, `quux` or `quux=1`"),
        ("eval", "give a shorter `context`; use `backend=cpu`", "give a shorter --context; use --device cpu"),
        ("run", "give a shorter `context`: `path` x exists", "give a shorter `context`: --output x exists"),
        ("baseline", "`kv_types`=x with `context` 5 and `compress=2`", "--kv-types=x with --context 5 and --compress 2"),
        ("sweep", "`resume=True` goes on with `export` a.csv", "--resume goes on with --export a.csv"),
        ("compare", "with `allow_different_device=True`; `margin_percent`", "with --allow-different-device; --margin"),
    ],
)
def test_a_parameter_is_shown_as_the_flag_of_the_command(name, message, shown):
    assert with_flags(message, command(name)) == shown


def test_every_synonym_is_a_flag_of_some_command():
    known = {name for each in COMMANDS for name in flags_of(command(each))}
    assert {name for names in SYNONYMS.values() for name in names} <= known


def test_errors_and_warnings_of_a_subcommand_name_its_flags(monkeypatch, capsys):
    @click.group()
    def program():
        pass

    @program.command("measure")
    @click.option("--seq", type=int)
    def measure(seq):
        warnings.warn("`context` is short", stacklevel=1)
        raise UsageError(f"`context`={seq} is too long")

    monkeypatch.setattr("sys.argv", ["elastickv", "measure", "--seq=5"])
    with pytest.raises(SystemExit) as stop:
        exit_with(program, "elastickv")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "elastickv: warning: --seq is short\nelastickv: error: --seq=5 is too long\n"
