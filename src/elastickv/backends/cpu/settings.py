"""Numba's settings in the environment: what it answers with a trace, or does not survive, is refused."""

import os
import warnings

from elastickv.errors import UsageError

MAX_THREADS = 1024  # each has a stack and scratch; some thousands end the process


def check_settings() -> None:
    """Import Numba and start its threads, as the environment says.

    Raises
    ------
    UsageError : if Numba does not understand a variable, or cannot or should not run so.
    """
    try:
        with warnings.catch_warnings():
            # Numba warns with a whole trace, and goes on with a value of its own.
            warnings.filterwarnings("error", "Environment variable", RuntimeWarning)
            import numba
        if numba.config.DISABLE_JIT:
            raise ValueError("nothing is compiled where NUMBA_DISABLE_JIT is set")
        if numba.config.NUMBA_NUM_THREADS > MAX_THREADS:
            raise ValueError(f"at most {MAX_THREADS} threads are accepted")
        numba.get_num_threads()
    except (RuntimeWarning, ValueError) as error:
        reason = str(error).partition("\nThe parse failed")[0].rstrip(".")
        given = ", ".join(f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("NUMBA_"))
        raise UsageError(f"the cpu back end cannot start with {given}: {reason}; mend or unset it") from None
