"""What went wrong, by who can mend it: each message is one line that says what was found and what to do."""

MOST_CHARACTERS = 2000


def printable(text: str) -> str:
    """Return `text` with what steers a terminal, and what is no Unicode, shown as `ascii` does; line ends stay.

    What came from a file may say anything: shown as it stands it could hide or forge what we print.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """Return `text` printable, on one line, its middle left out where it is very long."""
    line = " ".join(printable(text).split())
    half = MOST_CHARACTERS // 2
    return line if len(line) <= MOST_CHARACTERS else f"{line[:half]} ... {line[-half:]}"


class UsageError(ValueError):
    """Bad input. The command line prints its message, which is one line whatever it quotes, and exits 2."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class DoesNotFit(UsageError):
    """The device's memory is too small for what was asked."""


class RanOut(DoesNotFit):
    """The device's memory, which seemed large enough, ran out on the way."""


class KernelMismatch(RuntimeError):
    """A back end disagrees with the float64 reference: no figure may be reported."""


class NonFiniteError(RuntimeError):
    """A NaN or infinity met where attention stores or computes; the message names the position."""


class DeviceFailure(RuntimeError):
    """The device, its driver or its compiler failed. The command line prints its message as one line and exits 4."""


class DeviceLost(DeviceFailure):
    """The device's context is gone: nothing can be measured in this process any more, in another one perhaps."""


class CompileFailure(DeviceFailure):
    """A kernel does not compile; the message names it, its architecture and the first lines of the compiler's log."""
