"""What a kernel reports of a token that cannot be stored."""

from dataclasses import dataclass

NO_BAD_TOKEN = -1
REPORTED_STEPS = 4  # of which a kernel's reports are kept apart; kernels/store_blocks.cu


@dataclass(frozen=True)
class BadToken:
    """A token of a request with a value that cannot be stored; of several the first, in the first layer that has it.

    Attributes
    ----------
    layer : number of the layer.
    position : in the request.
    too_large : a finite key that is beyond the range of its format; otherwise a key or value is NaN or infinite.
    """

    layer: int
    position: int
    too_large: bool

    @classmethod
    def of(cls, word: int) -> "BadToken | None":
        """Return what an int64 word says that a kernel may have lowered; None if it is still `NO_BAD_TOKEN`."""
        if word == NO_BAD_TOKEN:
            return None
        return cls(layer=word >> 1 & 0x3FFFFFFF, position=word >> 31, too_large=bool(word & 1))

    @property
    def word(self) -> int:
        """The int64 word, as `of` reads it."""
        return self.position << 31 | self.layer << 1 | self.too_large

    @property
    def reason(self) -> str:
        """What is wrong with the token."""
        return "a key beyond the range of the page format" if self.too_large else "a NaN or an infinity in keys or values"
