"""The one error path: one line on stderr and an exit code. docs/failures.md lists the codes."""

import _thread
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import click

from elastickv.cli import standard_streams
from elastickv.cli.flags import running, with_flags
from elastickv.errors import DeviceFailure, KernelMismatch, NonFiniteError, UsageError, one_line

WRONG = 1
BAD_INPUT = 2
DEVICE_FAILED = 4
_SIGNALLED = 128
_REPEAT_S = 0.05
# These signals keep what was measured, as Ctrl-C does.
_ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_ended_by = signal.SIGINT


def exit_with(command: click.Command, name: str) -> None:
    """Run `command` and leave the process with its exit code."""
    standard_streams.prepare()
    with _ended_like_interrupted(), _warnings_in_one_line():
        code = _code(command, name)
    sys.exit(code)


def interrupted() -> int:
    """Return the exit code after Ctrl-C, or after the signal that ended the process: 128 and its number."""
    return _SIGNALLED + _ended_by


def _code(command: click.Command, name: str) -> int:
    try:
        return _run(command, name) or 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return BAD_INPUT
    except click.ClickException as error:
        hint = f" (see {name} --help)" if isinstance(error, click.UsageError) else ""
        return _say(name, error.format_message() + hint, BAD_INPUT)
    except OSError as error:
        if error.filename is None:
            standard_streams.silence()
        if standard_streams.reader_left(error):
            return 0
        return _say(name, f"{error.filename or 'output'}: {error.strerror or error}; give another file or folder", BAD_INPUT)
    except (KeyboardInterrupt, click.Abort, EOFError):
        return _say(name, "interrupted before there was a result to keep", interrupted())


def _run(command: click.Command, name: str) -> Any:
    if f"_{name}_COMPLETE".upper() in os.environ:
        return command.main(prog_name=name)
    for argument in sys.argv[1:]:
        try:
            os.fsencode(argument)
        except UnicodeEncodeError:
            return _say(name, f"argument {argument} is not valid Unicode: give one that a file may be named", BAD_INPUT)
    # Not `main`, which makes a gate's 1 of a reader that left.
    with command.make_context(name, sys.argv[1:]) as context:
        try:
            return command.invoke(context)
        except (click.exceptions.Exit, click.ClickException, click.Abort, OSError, EOFError):
            raise
        except Exception as error:
            message, code = _known(error)
            return _say(name, with_flags(message, running(context)), code)


def _known(error: Exception) -> tuple[str, int]:
    """Return the message and the exit code of an error that the program expects; raise any other one again."""
    from elastickv.backends.driver_errors import recognized

    known = recognized(error) or error
    if isinstance(known, UsageError):
        return str(known), BAD_INPUT
    if isinstance(known, MemoryError):
        return f"out of memory: {known or 'give a shorter `seq` or fewer `heads`'}", BAD_INPUT
    if isinstance(known, (KernelMismatch, NonFiniteError)):
        return str(known), WRONG
    if isinstance(known, DeviceFailure):
        return str(known), DEVICE_FAILED
    raise error


def _say(name: str, message: str, code: int) -> int:
    with suppress(OSError):  # Without a reader of errors, the exit code remains.
        print(f"{name}: error: {one_line(message)}", file=sys.stderr)
    return code


def _interrupted_again(lost: Any) -> None:
    """Repeat a Ctrl-C that Python dropped inside a callback of a library; report other exceptions as usual."""
    if isinstance(lost.exc_value, KeyboardInterrupt):
        threading.Timer(_REPEAT_S, _thread.interrupt_main, [_ended_by]).start()
    else:
        sys.__unraisablehook__(lost)


@contextmanager
def _ended_like_interrupted() -> Iterator[None]:
    """Handle SIGTERM and SIGHUP like Ctrl-C, unless they are ignored or handled already (nohup)."""
    global _ended_by

    def end(number: int, frame: FrameType | None) -> None:
        global _ended_by
        _ended_by = signal.Signals(number)
        raise KeyboardInterrupt

    _ended_by = signal.SIGINT
    mine = threading.current_thread() is threading.main_thread()
    taken = [number for number in _ENDING if mine and signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    sys.unraisablehook = _interrupted_again
    try:
        yield
    finally:
        sys.unraisablehook = sys.__unraisablehook__
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    def line(message: Warning | str, *_: Any) -> None:
        context = click.get_current_context(silent=True)
        text = one_line(str(message))
        click.echo(f"elastickv: warning: {with_flags(text, context.command) if context else text}", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = line  # type: ignore[assignment]
        yield
