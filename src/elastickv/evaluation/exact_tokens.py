"""Sinks and window that all compared formats have, in a module that needs no PyTorch: options name it."""

import re
from dataclasses import dataclass

from elastickv.errors import UsageError


@dataclass(frozen=True)
class ExactTokens:
    """The first `sinks` and the newest `window` tokens, exact in every format that is compared."""

    sinks: int
    window: int

    @classmethod
    def parse(cls, text: str) -> "ExactTokens | None":
        """Return what `4+128` says; None for `own`, each format's own.

        Raises
        ------
        UsageError : if it is neither.
        """
        if text == "own":
            return None
        match = re.fullmatch(r"([0-9]{1,6})\+([0-9]{1,6})", text)
        if not match:
            raise UsageError(f"`exact_tokens`={text} is unknown: write own, or sinks and window as in 4+128")
        return cls(int(match[1]), int(match[2]))
