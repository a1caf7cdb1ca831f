"""Numba's compiled code of this folder on disk, and the error if a kernel does not compile."""

import gc
import hashlib
import linecache
import pickle
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import Any

import llvmlite
import numba
from numba.core import ccallback, config, dispatcher
from numba.core.caching import FunctionCache
from numba.core.errors import NumbaError
from numba.core.registry import cpu_target
from numba.core.serialize import dumps
from numba.core.sigutils import normalize_signature

from elastickv.backends.kernel_cache import cache_folder, load_compiled, save_compiled, sources_digest, writable
from elastickv.errors import CompileFailure

_FOLDER = Path(__file__).parent
_PACKAGE = __name__.rpartition(".")[0]
_LOG_LINES = 6
_lock = RLock()
_digest = cache(sources_digest)
_writable = cache(writable)  # a temporary folder replaces one that cannot be written: the same for all kernels


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

    def has(self, key: Any) -> bool:
        """Return whether something was saved under `key`."""
        return self._path(key).is_file()

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

    def has(self, signature: Any, codegen: Any) -> bool:
        """Return whether the code of a signature is on disk."""
        return self._cache_file.has(self._index_key(signature, codegen))


def compiled_folder() -> Path:
    """Return the folder of the compiled code, created if needed: NUMBA_CACHE_DIR, or ElasticKV's cache folder."""
    return _writable(Path(config.CACHE_DIR) if config.CACHE_DIR else cache_folder("numba") / _digest(_FOLDER))


@contextmanager
def cache_kernels_on_disk(name: str | None = None) -> Iterator[None]:
    """Store the code of functions that are decorated inside in `compiled_folder`.

    Numba looks for changes only in a function's own file. The code here also depends on the other files of this folder, so the
    cache folder is named after a digest of all of them. Numba's own folder fails in a read-only installation without a home.

    Raises
    ------
    CompileFailure : if one of them does not compile. `name` is that of the only one, if it was decorated elsewhere.
    """
    users: tuple[Any, ...] = (ccallback, dispatcher)
    with _lock:
        before, replaced = config.CACHE_DIR, [user.FunctionCache for user in users]
        config.CACHE_DIR = str(compiled_folder())
        for user in users:
            user.FunctionCache = _Cache
        try:
            yield
        except NumbaError as error:
            raise CompileFailure(_compile_error(error, name)) from error
        finally:
            config.CACHE_DIR = before
            for user, function_cache in zip(users, replaced, strict=True):
                user.FunctionCache = function_cache


@contextmanager
def _without_collections() -> Iterator[None]:
    """Let Python's garbage collector rest: a compiler makes a million objects that live until it is done."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Kernel:
    """A function that compiled code calls by its address. It is compiled on first use, or its code is read from disk."""

    def __init__(self, function: Callable[..., None], signature: str) -> None:
        self._function, self._signature = function, signature
        self.name = f"{function.__module__.removeprefix(f'{_PACKAGE}.')}.{function.__name__}"

    @cached_property
    def address(self) -> int:
        """The address of the compiled function.

        Raises
        ------
        CompileFailure : if it does not compile.
        """
        with cache_kernels_on_disk(".py:".join(self.name.rsplit(".", 2)[-2:])), _without_collections():
            self._callback.compile()
        return int(self._callback.address)

    @cached_property
    def _callback(self) -> Any:
        callback = ccallback.CFunc(self._function, normalize_signature(self._signature), {}, {"error_model": "numpy"})
        callback.enable_caching()
        return callback

    def is_compiled(self) -> bool:
        """Return whether `address` needs no compiler."""
        if "address" in vars(self):
            return True
        with cache_kernels_on_disk():
            callback = self._callback
            return bool(callback._cache.has(callback._sig, cpu_target.target_context.codegen()))


def kernel(signature: str) -> Callable[[Callable[..., None]], Kernel]:
    """Return a decorator that makes a `Kernel` of a function."""
    return lambda function: Kernel(function, signature)


def _compile_error(error: NumbaError, name: str | None) -> str:
    """Return a message with the kernel, the processor and the first lines of Numba's error."""
    processor = config.CPU_NAME or platform.processor() or platform.machine()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    log = [line.strip() for line in plain.splitlines() if line.strip()][:_LOG_LINES]
    name = name or _kernel(error.__traceback__)
    return (
        f"{name} does not compile with Numba {numba.__version__} for {processor}: {' | '.join(log)}; "
        "pip install --force-reinstall numba llvmlite, or report it"
    )


def _kernel(trace: TracebackType | None) -> str:
    """Return file and name of the function of this folder that was being decorated."""
    name = "a kernel"
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        if _FOLDER in file.parents and file != Path(__file__):
            lines = linecache.getlines(str(file))[trace.tb_lineno - 1 :]
            named = next(filter(None, (re.match(r"\s*def (\w+)", line) for line in lines)), None)
            name = f"{file.name}:{named[1] if named else trace.tb_lineno}"
        trace = trace.tb_next
    return name
