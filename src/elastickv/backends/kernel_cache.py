"""Files of compiled kernels. A damaged file counts as absent; a full folder only costs the time to compile again."""

import atexit
import hashlib
import os
import shutil
import tempfile
import warnings
from pathlib import Path

from platformdirs import user_cache_path

_DIGEST_BYTES = 32
_PROBE_BYTES = 1 << 16  # a folder that takes less has no room for a kernel
_warned = False


def cache_folder(kind: str) -> Path:
    """Return the folder for compiled kernels of a kind: ELASTICKV_CACHE_DIR, or one in the user's cache folder."""
    if folder := os.environ.get("ELASTICKV_CACHE_DIR"):
        return Path(folder)
    return _user_folder() / kind


def _user_folder() -> Path:
    """Return ElasticKV's folder in the user's cache folder; a path where nothing can be stored for a user without a home."""
    try:
        folder = user_cache_path("elastickv", appauthor=False, opinion=False)
    except RuntimeError:  # newer versions of platformdirs
        return Path(os.devnull)
    return Path(os.devnull) if folder.parts[0] == "~" else folder


def obstacle(folder: Path) -> str | None:
    """Return why nothing can be stored in `folder`; None if something can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return None


def writable(folder: Path) -> Path:
    """Return `folder`, created if needed. If it cannot be written, warn and return a temporary one until this process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = obstacle(folder)
    except OSError as error:
        reason = error.strerror or str(error)
    if reason is None:
        return folder
    _warn(folder, reason)
    temporary = tempfile.mkdtemp(prefix="elastickv-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return Path(temporary)


def load_compiled(path: Path) -> bytes | None:
    """Return what `save_compiled` wrote to `path`; None if it is absent, damaged, or could be from another user.

    The file holds code, so one that another user owns or may write is not loaded, whatever its digest.
    """
    try:
        with path.open("rb") as file:
            data = file.read() if _ours(os.fstat(file.fileno())) else b""
    except OSError:
        return None
    digest, body = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    return body if hashlib.sha256(body).digest() == digest else None


def _ours(status: os.stat_result) -> bool:
    return not hasattr(os, "getuid") or (status.st_uid in (0, os.getuid()) and not status.st_mode & 0o022)


def save_compiled(path: Path, body: bytes) -> None:
    """Write `body` to `path` behind its digest, atomically, also with several writers. If that fails, warn once."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = file.name
            file.write(hashlib.sha256(body).digest() + body)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        _warn(path.parent, error.strerror or str(error))


def _warn(folder: Path, reason: str) -> None:
    global _warned
    if _warned:
        return
    _warned = True
    warnings.warn(
        f"compiled kernels cannot be kept in {folder} ({reason}): every start compiles them again; make room there, or set "
        "ELASTICKV_CACHE_DIR to a folder that can be written",
        stacklevel=3,
    )


def sources_digest(folder: Path) -> str:
    """Return a digest of the Python files in and below `folder`, which names the code that was compiled from them."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
