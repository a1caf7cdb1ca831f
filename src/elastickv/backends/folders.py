"""Where compiled kernels are kept between runs."""

import hashlib
import os
import sys
import tempfile
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """Return the folder for compiled kernels of a kind: under ELASTICKV_CACHE_DIR, or the user's cache folder."""
    if given := os.environ.get("ELASTICKV_CACHE_DIR"):
        return Path(given)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "elastickv" / kind


def writable(folder: Path) -> Path:
    """Return `folder`, made if need be; a fresh temporary one if it cannot be written: a new compilation, no more."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="elastickv-"))


def sources_digest(folder: Path) -> str:
    """Return a digest of the Python files in `folder`: compiled code of other sources must not be taken for theirs."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
