"""Errors, by who can mend them. Each message is one line that says what is wrong and what to do.

A message names a parameter of the Python API between backquotes, alone or with a value: ``give a shorter `seq` ``,
``use `backend=cpu` ``. Code outside `elastickv.cli` never writes a flag; `elastickv.cli.flags` shows the parameters of a
message as the flags of the command that was typed: `--seq`, `--backend cpu`.
"""

from typing import Any

MAX_CHARACTERS = 2000


def printable(text: str, keep: str = "\n\t") -> str:
    """Return `text` with control characters and invalid Unicode escaped as `ascii` does; those of `keep` stay.

    Text from a file may say anything: printed as it is, it could hide or forge other output.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """Return `text` printable and on one line, with its middle left out where it is very long."""
    line = " ".join(printable(text).split())
    half = MAX_CHARACTERS // 2
    return line if len(line) <= MAX_CHARACTERS else f"{line[:half]} ... {line[-half:]}"


class UsageError(ValueError):
    """Bad input. The message is always one line; the command line prints it and exits 2."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class PartialResult(RuntimeError):
    """Something failed after a part of the result was finished. The command line shows and writes the part, then the error.

    Attributes
    ----------
    result : what was finished, as JSON values.
    error : what failed; it decides the exit code.
    """

    def __init__(self, result: dict[str, Any], error: Exception) -> None:
        super().__init__(str(error))
        self.result, self.error = result, error


class DoesNotFit(UsageError):
    """The device has too little memory for the request."""


class RanOut(DoesNotFit):
    """The device ran out of memory although it seemed to have enough."""


class KernelMismatch(RuntimeError):
    """A backend disagrees with the float64 reference: no result may be reported."""


class NonFiniteError(RuntimeError):
    """A NaN or infinity where attention stores or computes; the message names the position."""


class DeviceFailure(RuntimeError):
    """The device, its driver or its compiler failed. The command line prints the message as one line and exits 4."""


class DeviceLost(DeviceFailure):
    """The device's context is gone: nothing more can be measured in this process, perhaps in another one."""


class CompileFailure(DeviceFailure):
    """A kernel does not compile; the message names it, its architecture and the first lines of the compiler's log."""
