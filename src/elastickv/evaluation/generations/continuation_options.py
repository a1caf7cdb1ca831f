"""What long texts to generate, in a module that needs no PyTorch: the command line shows the defaults."""

from dataclasses import dataclass

from elastickv.errors import UsageError

_MOST_SEED = 2**63 - 1


@dataclass(frozen=True)
class ContinuationOptions:
    """Texts after each window: one is decoded greedily, the others are sampled.

    Attributes
    ----------
    tokens : of each text, if it does not end earlier; 0 for no texts.
    samples : texts that are sampled after each window.
    temperature : the logits are divided by it before sampling.
    top_p : tokens are sampled from the smallest set that has this much probability (nucleus sampling, Holtzman et al. 2020,
        arXiv 1904.09751, who use 0.95).
    seed : of the random numbers, the same for every cache.

    Raises
    ------
    UsageError : if one of them is out of range.
    """

    tokens: int = 0
    samples: int = 4
    temperature: float = 1.0
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        for name, count in (("generate", self.tokens), ("samples", self.samples)):
            if count < 0:
                raise UsageError(f"`{name}`={count} is out of range: give a whole number from 0 up")
        if not 0 < self.temperature < float("inf"):
            raise UsageError(f"`temperature`={self.temperature:g} is out of range: give a number above 0")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"`top_p`={self.top_p:g} is out of range: give a number above 0 and up to 1")
        if not 0 <= self.seed <= _MOST_SEED:
            raise UsageError(f"`seed`={self.seed} is out of range: give a whole number from 0 to {_MOST_SEED}")
