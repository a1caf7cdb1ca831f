"""Where compiled kernels are kept: a file that is damaged counts as absent, a folder that is full costs time, no more."""

import atexit
import hashlib
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

_DIGEST_BYTES = 32
_PROBE_BYTES = 1 << 16  # a folder that takes less has no room for a kernel
_warned = False


def cache_folder(kind: str) -> Path:
    """Return the folder for compiled kernels of a kind: under ELASTICKV_CACHE_DIR, or the user's cache folder."""
    if given := os.environ.get("ELASTICKV_CACHE_DIR"):
        return Path(given)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or _home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = _home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache")
    return base / "elastickv" / kind


def _home() -> Path:
    """Return the user's home; where the system tells none, what nothing can be kept in: a warning says so."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(os.devnull)


def obstacle(folder: Path) -> str | None:
    """Return why nothing can be kept in `folder`; None where something can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return None


def writable(folder: Path) -> Path:
    """Return `folder`, made if need be; where it cannot be written, a temporary one until this process ends, with a warning."""
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
    """Return what `save_compiled` put into `path`; None if it is absent, damaged in any way, or could be somebody else's.

    It is code: what another user owns or may write is none of ours, whatever its digest says.
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
    """Put `body` into `path` behind its digest: atomic for readers, whoever writes beside. Where it can't, warn once."""
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
        f"compiled kernels cannot be kept in {folder} ({reason}): every start compiles them anew; make room there, or set "
        "ELASTICKV_CACHE_DIR to a folder that can be written",
        stacklevel=3,
    )


def sources_digest(folder: Path) -> str:
    """Return a digest of the Python files in `folder`: compiled code of other sources must not be taken for theirs."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
