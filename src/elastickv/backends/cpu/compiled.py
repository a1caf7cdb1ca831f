"""Where Numba keeps what it compiles of this folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from numba.core import config

from elastickv.backends.folders import cache_folder, sources_digest, writable


@contextmanager
def kernels_kept_on_disk() -> Iterator[None]:
    """Let the functions that are decorated inside keep their code in a folder of their own, unless NUMBA_CACHE_DIR names one.

    Numba looks for changes in the file of a function only; its code here is also made of other files of this folder, so the
    folder is named after all of them. Elsewhere Numba would refuse a read-only installation without a home.
    """
    before = config.CACHE_DIR
    if not before:
        config.CACHE_DIR = str(writable(cache_folder("numba") / sources_digest(Path(__file__).parent)))
    try:
        yield
    finally:
        config.CACHE_DIR = before
