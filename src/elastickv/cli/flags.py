"""The one place where a parameter that a message of the library names becomes the flag of the command that was typed."""

import re

import click

# What the library calls otherwise than a command does: names to try, in this order.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "backend": ("backend", "device"),
    "capacity": ("context", "seq"),
    "context": ("context", "seq"),
    "device": ("device", "devices"),
    "format_": ("format",),
    "graphs": ("no_graphs",),
    "margin_percent": ("margin",),
    "fidelity_margin_percent": ("fidelity_margin",),
    "path": ("output",),
    "seq": ("seq", "context"),
}
_PARAMETER = re.compile(r"`([a-z][a-z0-9_]*)(?:=([^`\s]*))?`")


def flags_of(command: click.Command) -> dict[str, str]:
    """Return parameter -> flag of a command, and of a group of commands that share their options."""
    commands = [command]
    if isinstance(command, click.Group):
        context = click.Context(command)
        commands = [inner for name in command.list_commands(context) if (inner := command.get_command(context, name))]
    flags: dict[str, str] = {}
    for option in (parameter for each in commands for parameter in each.params if isinstance(parameter, click.Option)):
        spellings = [spelling for spelling in option.opts if spelling.startswith("--")]
        flags |= {spelling.lstrip("-").replace("-", "_"): spelling for spelling in spellings}
        flags.setdefault(option.name or "", next(iter(spellings), option.opts[0]))
    return flags


def running(context: click.Context) -> click.Command:
    """Return the subcommand that a context has run, or its own command."""
    if isinstance(context.command, click.Group) and context.invoked_subcommand:
        return context.command.get_command(context, context.invoked_subcommand) or context.command
    return context.command


def with_flags(message: str, command: click.Command) -> str:
    """Return a message with each parameter between backquotes shown as the command's flag.

    `` `seq` `` becomes `--seq`, `` `backend=cpu` `` becomes `--backend cpu`, `` `paired=True` `` becomes `--paired-baseline`.
    What is no parameter of the command stays.
    """
    flags = flags_of(command)

    def flag(match: re.Match[str]) -> str:
        name, value = match[1], match[2]
        spelling = next((flags[other] for other in SYNONYMS.get(name, (name,)) if other in flags), None)
        if spelling is None:
            return match[0]
        return spelling if value in (None, "", "True", "False") else f"{spelling} {value}"

    return _PARAMETER.sub(flag, message)
