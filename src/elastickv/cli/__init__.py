"""The command line. Each subcommand is one file, imported when it runs."""

from importlib import import_module

import click

from elastickv.cli.error_handling import exit_with
from elastickv.version import __version__

COMMANDS: dict[str, str] = {
    "bench": "Measure decode attention at 1/C of the KV bytes against a dense baseline.",
    "calibrate": "Measure what each KV head of a model loses, for recipes to be solved from.",
    "eval": "Measure what a model's predictions lose at each C, through the real decode path.",
    "run": "Generate text with a model through an elastic KV cache, and show its speed and memory.",
    "sweep": "Measure a grid of contexts, batches, ratios and recipes; crash-safe and resumable.",
    "compare": "Say cell by cell whether one result is as fast as another, and as faithful; a gate for CI.",
    "report": "Make one page of results: an offline HTML page, Markdown or a picture.",
    "baseline": "Measure a small real model as a reference: Transformers' caches, or llama.cpp's.",
    "doctor": "Show what is installed, what will be used, what is missing and how to get it.",
}


class LazyGroup(click.Group):
    """A group that imports a subcommand only to run it: `elastickv --help` stays fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the subcommands' names."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a subcommand."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"elastickv.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="elastickv")
def root() -> None:
    """ElasticKV: a byte budget for the KV cache of decoding language models."""


def main() -> None:
    """Run `elastickv`."""
    exit_with(root, "elastickv")
