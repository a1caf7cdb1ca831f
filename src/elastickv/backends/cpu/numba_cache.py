"""Numba's compiled code of this folder on disk, and the error if a kernel does not compile."""

import hashlib
import linecache
import pickle
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import llvmlite
import numba
from numba.core import ccallback, config, dispatcher
from numba.core.caching import FunctionCache
from numba.core.errors import NumbaError
from numba.core.serialize import dumps

from elastickv.backends.kernel_cache import cache_folder, load_compiled, save_compiled, sources_digest, writable
from elastickv.errors import CompileFailure

_FOLDER = Path(__file__).parent
_LOG_LINES = 6


class _Files:
    """The compiled code of one function, a file for each signature and processor.

    Numba's own files have no digest, so a damaged one ends the program, and their index is not safe with several processes.
    """

    def __init__(self, stem: Path, stamp: Any) -> None:
        self._stem, self._version = stem, (numba.__version__, llvmlite.__version__, stamp)

    def load(self, key: Any) -> Any:
        """Return what was saved under `key`; None if it is absent or damaged."""
        body = load_compiled(self._path(key))
        return None if body is None else pickle.loads(body)

    def save(self, key: Any, data: Any) -> None:
        """Save `data` under `key`."""
        save_compiled(self._path(key), dumps(data))

    def _path(self, key: Any) -> Path:
        digest = hashlib.sha256(repr((self._version, key)).encode()).hexdigest()
        return self._stem.with_name(f"{self._stem.name}.{digest[:32]}.kernel")


class _Cache(FunctionCache):  # type: ignore[misc]
    """Numba's cache of a function on `_Files`. Numba's own check of the folder would raise if it is full or read-only."""

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        locator = self._impl.locator
        self._cache_file = _Files(Path(self._cache_path, self._impl.filename_base), locator.get_source_stamp())
        locator.ensure_cache_path = lambda: None


@contextmanager
def cache_kernels_on_disk() -> Iterator[None]:
    """Store the code of functions that are decorated inside in ElasticKV's cache folder, unless NUMBA_CACHE_DIR names one.

    Numba looks for changes only in a function's own file. The code here also depends on the other files of this folder, so the
    cache folder is named after a digest of all of them. Numba's own folder fails in a read-only installation without a home.

    Raises
    ------
    CompileFailure : if one of them does not compile.
    """
    before: str = config.CACHE_DIR
    users: tuple[Any, ...] = (ccallback, dispatcher)
    config.CACHE_DIR = str(writable(Path(before) if before else cache_folder("numba") / sources_digest(_FOLDER)))
    for user in users:
        user.FunctionCache = _Cache
    try:
        yield
    except NumbaError as error:
        raise CompileFailure(_compile_error(error)) from error
    finally:
        config.CACHE_DIR = before
        for user in users:
            user.FunctionCache = FunctionCache


def _compile_error(error: NumbaError) -> str:
    """Return a message with the kernel, the processor and the first lines of Numba's error."""
    processor = config.CPU_NAME or platform.processor() or platform.machine()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    log = [line.strip() for line in plain.splitlines() if line.strip()][:_LOG_LINES]
    return (
        f"{_kernel(error.__traceback__)} does not compile with Numba {numba.__version__} for {processor}: {' | '.join(log)}; "
        "pip install --force-reinstall numba llvmlite, or report it"
    )


def _kernel(trace: TracebackType | None) -> str:
    """Return file and name of the function of this folder that was being decorated."""
    name = "a kernel"
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        if file.parent == _FOLDER and file != Path(__file__):
            lines = linecache.getlines(str(file))[trace.tb_lineno - 1 :]
            named = next(filter(None, (re.match(r"\s*def (\w+)", line) for line in lines)), None)
            name = f"{file.name}:{named[1] if named else trace.tb_lineno}"
        trace = trace.tb_next
    return name
