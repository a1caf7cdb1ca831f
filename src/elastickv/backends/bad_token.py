"""What a kernel reports of a token that cannot be stored."""

from dataclasses import dataclass

NO_BAD_TOKEN = -1
_TOO_LARGE = 1 << 63


@dataclass(frozen=True)
class BadToken:
    """A token of a step with a value that cannot be stored; of several the one of the least request, then position.

    Attributes
    ----------
    request : row of the step's `lengths`.
    position : in the request.
    too_large : a finite key that is beyond the range of its format; otherwise a key or value is NaN or infinite.
    """

    request: int
    position: int
    too_large: bool

    @classmethod
    def of(cls, word: int) -> "BadToken | None":
        """Return what an int64 word says that a kernel may have lowered; None if it is still `NO_BAD_TOKEN`."""
        if word == NO_BAD_TOKEN:
            return None
        bits = word & (2 * _TOO_LARGE - 1)
        return cls(request=bits >> 32 & 0x7FFFFFFF, position=bits & 0xFFFFFFFF, too_large=bits >= _TOO_LARGE)

    @property
    def word(self) -> int:
        """The int64 word, as `of` reads it."""
        bits = (_TOO_LARGE if self.too_large else 0) | self.request << 32 | self.position
        return bits - 2 * _TOO_LARGE if bits >= _TOO_LARGE else bits

    @property
    def reason(self) -> str:
        """What is wrong with the token."""
        return "a key beyond the range of the page format" if self.too_large else "a NaN or an infinity in keys or values"
