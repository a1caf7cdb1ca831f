"""Build hook: record the commit in the wheel as `elastickv/commit.txt`, and next to pyproject.toml in the sdist.

A wheel built from the sdist is then identical to the one built from the checkout.
"""

import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NAME = "commit.txt"


class RecordCommit(BuildHookInterface):  # type: ignore[misc]
    """Includes a temporary file, so that building does not change the checkout."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        commit = self._commit()
        if not commit:
            return
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name) / NAME
        path.write_text(commit + "\n", encoding="ascii")
        build_data["force_include"][str(path)] = f"elastickv/{NAME}" if self.target_name == "wheel" else NAME

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "_folder"):
            self._folder.cleanup()

    def _commit(self) -> str | None:
        if not (Path(self.root) / ".git").exists():
            brought = Path(self.root) / NAME  # by an sdist
            return brought.read_text(encoding="ascii").strip() if brought.exists() else None
        try:
            head = ["git", "-C", self.root, "rev-parse", "HEAD"]
            changes = ["git", "-C", self.root, "status", "--porcelain", "--", "src"]
            commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
            changed = subprocess.run(changes, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None
        return commit + ("+changes" if changed else "")
