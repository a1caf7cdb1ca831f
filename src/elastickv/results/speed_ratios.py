"""How many times as fast a model decodes with one KV cache as with another, whichever program measured it."""

from collections.abc import Mapping
from dataclasses import dataclass

from elastickv.benchmark.stats.intervals import Interval
from elastickv.results.kinds.gguf_result import GgufBaseline
from elastickv.results.kinds.model_result import ELASTIC, ModelBenchResult, RunResult

_STOCK = "stock"


@dataclass(frozen=True)
class SpeedRatio:
    """Time with the cache `slow` / time with the cache `fast`.

    Attributes
    ----------
    estimate : from pairs; where they are too few, the ratio of the mean speeds.
    low, high : 95 % interval; None for fewer than three pairs.
    samples : pairs; None where the file does not say.
    """

    fast: str
    slow: str
    estimate: float
    low: float | None
    high: float | None
    samples: int | None


def model_ratios(result: ModelBenchResult | RunResult) -> dict[str, SpeedRatio]:
    """Return the ratios of the elastic cache to each other one, by the other's name."""
    measured = {_STOCK: result.speedup} if isinstance(result, RunResult) else result.speedups
    rates = {cache.cache: cache.tokens_per_s for cache in result.caches}
    ratios = (_ratio(ELASTIC, slow, interval, rates) for slow, interval in measured.items())
    return {ratio.slow: ratio for ratio in ratios if ratio is not None}


def gguf_ratios(result: GgufBaseline) -> dict[str, SpeedRatio]:
    """Return the ratios of each KV cache type to the first, by its name."""
    rates: dict[str, float | None] = {cache.cache: cache.tokens_per_s for cache in result.caches}
    ratios = (_ratio(fast, result.baseline, interval, rates) for fast, interval in result.speedups.items())
    return {ratio.fast: ratio for ratio in ratios if ratio is not None}


def _ratio(fast: str, slow: str, measured: Interval | None, rates: Mapping[str, float | None]) -> SpeedRatio | None:
    if measured is not None:
        low, high = (measured.low, measured.high) if measured.is_shown else (None, None)
        return SpeedRatio(fast, slow, measured.estimate, low, high, measured.samples)
    own, other = rates.get(fast), rates.get(slow)
    return None if own is None or other is None else SpeedRatio(fast, slow, own / other, None, None, None)
