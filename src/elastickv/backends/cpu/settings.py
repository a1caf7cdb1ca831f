"""Numba's settings in the environment: those that Numba fails on, with a traceback or a crash, are refused."""

import os
import warnings

from elastickv.errors import UsageError

MAX_THREADS = 1024  # each has a stack and scratch; some thousands end the process


def check_settings(start_threads: bool = True) -> None:
    """Import Numba, and start its threads, with the settings of the environment.

    Raises
    ------
    UsageError : if Numba does not understand a variable, or cannot run with it.
    """
    try:
        with warnings.catch_warnings():
            # Numba warns with a whole traceback and continues with its default.
            warnings.filterwarnings("error", "Environment variable", RuntimeWarning)
            import numba
        if numba.config.DISABLE_JIT:
            raise ValueError("nothing is compiled where NUMBA_DISABLE_JIT is set")
        if numba.config.NUMBA_NUM_THREADS > MAX_THREADS:
            raise ValueError(f"at most {MAX_THREADS} threads are accepted")
        if start_threads:
            numba.get_num_threads()
    except (RuntimeWarning, ValueError) as error:
        reason = str(error).partition("\nThe parse failed")[0].rstrip(".")
        settings = ", ".join(f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("NUMBA_"))
        raise UsageError(f"the cpu backend cannot start with {settings}: {reason}; mend or unset it") from None
