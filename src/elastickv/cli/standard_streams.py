"""Standard streams that can always be written: open, and with a replacement for what their encoding lacks."""

import codecs
import errno
import os
import sys
from contextlib import suppress
from typing import Any

_STREAMS = 3
_WINDOWS = os.name == "nt"
# ASCII under a name of its own: Click takes a stream named ASCII for misconfigured and writes UTF-8 to it.
_PLAIN_ASCII = "elastickv_ascii"


def prepare() -> None:
    """Open the null device where a standard stream is closed, and let output replace the characters that it cannot encode."""
    _open_closed_ones()
    codecs.register(_plain_ascii)
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        _replace_unencodable(stream, errors)


def silence() -> None:
    """Discard what standard output still buffers, so that it cannot fail again while the interpreter shuts down."""
    with suppress(OSError):  # One that is no file can't fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def reader_left(error: OSError) -> bool:
    """Whether an error says that the reader of a pipe has left, for which Windows has another number."""
    return isinstance(error, BrokenPipeError) or (_WINDOWS and error.filename is None and error.errno == errno.EINVAL)


def _open_closed_ones() -> None:
    """Open the null device for closed streams: the next file must not get a stream's number, nor errors go to output."""
    while (handle := os.open(os.devnull, os.O_RDWR)) < _STREAMS:
        os.set_inheritable(handle, True)
    os.close(handle)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - as long as the process


def _replace_unencodable(stream: Any, errors: str) -> None:
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is None:  # one that a program put there, such as io.StringIO
        return
    if codecs.lookup(stream.encoding).name == "ascii":
        reconfigure(encoding=_PLAIN_ASCII, errors=errors)
    else:
        reconfigure(errors=errors)


def _plain_ascii(name: str) -> codecs.CodecInfo | None:
    """Return the codec of our name for ASCII."""
    if name != _PLAIN_ASCII:
        return None
    codec = codecs.lookup("ascii")
    return codecs.CodecInfo(
        codec.encode, codec.decode, codec.streamreader, codec.streamwriter, codec.incrementalencoder, codec.incrementaldecoder,
        name=_PLAIN_ASCII,
    )  # fmt: skip
