"""What a user did that we cannot do: one line that says what was given, what is accepted, what to do."""


class UsageError(ValueError):
    """Bad input. The command line prints its message as one line and exits 2."""


class DoesNotFit(UsageError):
    """The device's memory is too small for what was asked."""


class KernelMismatch(RuntimeError):
    """A back end disagrees with the float64 reference: no figure may be reported."""


class NonFiniteError(RuntimeError):
    """A NaN or infinity met where attention stores or computes; the message names the position."""
