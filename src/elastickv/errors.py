"""What went wrong, by who can mend it: each message is one line that says what was found and what to do."""


class UsageError(ValueError):
    """Bad input. The command line prints its message as one line and exits 2."""


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
