"""The one error path: what went wrong in one line on stderr, and an exit code.

0 done, 1 a gate failed or a kernel was wrong, 2 bad input, 3 a gate is inconclusive, 130 interrupted.
"""

import os
import sys

import click

from elastickv.errors import KernelMismatch, NonFiniteError, UsageError, one_line

BAD_INPUT = 2
WRONG = 1
INTERRUPTED = 130


def exit_with(command: click.Command, name: str) -> None:
    """Run `command` and leave the process with its exit code."""
    try:
        code = command.main(prog_name=name, standalone_mode=False)
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        code = BAD_INPUT
    except click.ClickException as error:
        hint = f" (see {name} --help)" if isinstance(error, click.UsageError) else ""
        code = _say(name, error.format_message() + hint, BAD_INPUT)
    except UsageError as error:
        code = _say(name, str(error), BAD_INPUT)
    except MemoryError as error:
        code = _say(name, f"out of memory: {error or 'give a shorter --seq or fewer --heads'}", BAD_INPUT)
    except (KernelMismatch, NonFiniteError) as error:
        code = _say(name, str(error), WRONG)
    except (KeyboardInterrupt, click.Abort):
        code = _say(name, "interrupted before dense and elastic were both measured", INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output left; the rest must not raise again while the interpreter shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        code = _say(name, f"{error.filename or 'output'}: {error.strerror or error}; give another file or folder", BAD_INPUT)
    sys.exit(code or 0)


def _say(name: str, message: str, code: int) -> int:
    print(f"{name}: error: {one_line(message)}", file=sys.stderr)
    return code
