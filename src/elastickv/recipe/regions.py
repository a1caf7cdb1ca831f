"""Which tokens are sinks, cold, or still exact at a given context."""

from dataclasses import dataclass

from elastickv.recipe.formats import PAGE_TOKENS as PAGE_TOKENS


@dataclass(frozen=True)
class Regions:
    """How many tokens of one sequence lie in each region.

    Attributes
    ----------
    sinks : first tokens, always exact.
    cold : tokens in full pages that are older than the window.
    recent : the window and the page that is still filling up behind it.
    """

    sinks: int
    cold: int
    recent: int

    @property
    def exact(self) -> int:
        """Tokens stored exactly: sinks and recent ones."""
        return self.sinks + self.recent


def regions(context: int, sinks: int, window: int) -> Regions:
    """Split `context` tokens into regions.

    Pages of 32 tokens start after the sinks; a page turns cold once all its tokens are older than the last `window`
    tokens, so between `window` and `window + 31` recent tokens are exact.
    """
    n_sinks = min(context, sinks)
    cold = max(0, context - sinks - window) // PAGE_TOKENS * PAGE_TOKENS
    return Regions(n_sinks, cold, context - n_sinks - cold)


def retained_tokens(cold: int, stride: int) -> int:
    """Return how many of the first `cold` cold tokens a stride stores: numbers 0, stride, 2 stride, ..."""
    return -(-cold // stride)


def selected(pages: int, fraction: float) -> int:
    """Return how many of `pages` cold pages a fraction reads: at least one, if there is any."""
    return min(pages, max(1, int(fraction * pages)))
