"""Texts that name no file, or one that cannot be read."""

import os

TEXTS = {
    "a long name": "x" * 300,
    "a long .gguf": "x" * 300 + ".gguf",
    "a long path": "a/" * 3000 + "b",
    "a zero byte": "x\0y",
    "two lines": "a\nb",
    "half a character": "\ud800",
    "no UTF-8": "\udc80x.json",
    "nothing": "",
    "the root": "/",
    "an unknown user": "~nobody-of-this-name/x",
    "an address": "https://example.org/a b.json",
    "a long recipe": "int4," * 100,
}


def files(folder):
    """Return paths in a folder that lead to no readable file: a folder, a link to itself, a pipe, a file below a file."""
    (folder / "folder").mkdir()
    (folder / "link").symlink_to(folder / "link")
    os.mkfifo(folder / "pipe")
    (folder / "file").write_text("x")
    return [folder / "folder", folder / "link", folder / "pipe", folder / "file" / "below", folder / "missing"]
