"""What to measure and how: validated values, before anything is allocated."""

from dataclasses import dataclass
from pathlib import Path

from elastickv.benchmark.gate import Gate
from elastickv.errors import UsageError
from elastickv.recipe import DTYPES, AttentionShape, Recipe, resolve
from elastickv.recipe.shape import MAX_CONTEXT, is_whole

PRESETS: dict[str, dict[str, int]] = {
    "long": {"seq": 4096, "heads": 32, "dim": 128, "compress": 4},
    "short": {"seq": 1024, "heads": 16, "dim": 64, "compress": 2},
}
CACHE_STATES: tuple[str, ...] = ("cold", "hot")


@dataclass(frozen=True)
class Options:
    """One benchmark run; the defaults are the original micro-benchmark's.

    Attributes
    ----------
    seq : context, tokens.
    heads, kv_heads, dim, batch : shape; `kv_heads` None is MHA.
    compress : the budget C.
    recipe : recipe text, or 'auto'.
    sinks, window, anchor_every : override the recipe's.
    dtype : the model's own: 'fp32', 'fp16', 'bf16'.
    reps, warmup : samples of each contender, and samples thrown away before.
    inner_loops : decode steps to a sample.
    truncate : percent of samples cut at either end.
    paired : interleave dense and elastic in randomised ABBA blocks.
    inference, decode_tokens, layers : the inference cycle; `layers` None is enough to exceed the last-level cache.
    graphs : capture CUDA graphs.
    cache : 'cold' rotates copies past the last-level cache, 'hot' repeats one.
    peers : peers to measure too: 'all', or beginnings of their names joined by commas; None is none.
    time_limit_s, until_ci_percent : stop early, at a time or at a half-width of the speed-up's interval.
    input : safetensors file of real activations; None is the shipped sample.
    gate : criteria for a verdict.
    dense : dtype of the only dense contender of ours; None tries every one and keeps the fastest.
    backend, device, seed : where, and with which random numbers.
    command : what was typed, for the record; empty when called from Python.
    """

    seq: int = 1024
    heads: int = 16
    dim: int = 64
    compress: float = 2.0
    reps: int = 200
    warmup: int = 20
    inner_loops: int = 64
    truncate: float = 5.0
    paired: bool = False
    inference: bool = False
    decode_tokens: int = 64
    graphs: bool = True
    batch: int = 1
    kv_heads: int | None = None
    dtype: str = "bf16"
    recipe: str = "auto"
    sinks: int | None = None
    window: int | None = None
    anchor_every: int | None = None
    layers: int | None = None
    cache: str = "cold"
    peers: str | None = None
    time_limit_s: float | None = None
    until_ci_percent: float | None = None
    input: Path | None = None
    gate: Gate | None = None
    dense: str | None = None
    backend: str = "auto"
    command: tuple[str, ...] = ()
    device: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _whole("--seq", self.seq, 1, MAX_CONTEXT)
        _whole("--heads", self.heads, 1, 65536)
        _whole("--batch", self.batch, 1, 65535)
        if self.kv_heads is not None:
            _whole("--kv-heads", self.kv_heads, 1, 65535)
        _whole("--reps", self.reps, 2, 1_000_000)
        _whole("--warmup", self.warmup, 0, 1_000_000)
        _whole("--inner_loops", self.inner_loops, 1, 65536)
        _within("--truncate", self.truncate, 0, 45)
        _whole("--decode_tokens", self.decode_tokens, 1, 65536)
        if self.layers is not None:
            _whole("--layers", self.layers, 1, 1024)
        if self.inference and self.seq + self.decode_tokens > MAX_CONTEXT:
            raise UsageError(f"--seq {self.seq} and {self.decode_tokens} decoded tokens exceed {MAX_CONTEXT}: give fewer")
        if self.time_limit_s is not None:
            _within("--time-limit", self.time_limit_s, 0.1, 86_400)
        if self.until_ci_percent is not None:
            _within("--until-ci", self.until_ci_percent, 0.01, 50)
        if self.until_ci_percent is not None and not self.paired:
            raise UsageError("--until-ci watches the interval of pairs: add --paired-baseline")
        if self.device is not None:
            _whole("--device", self.device, 0, 1023)
        if self.peers is not None and not self.peers.strip(" ,"):
            raise UsageError(f"--peers={self.peers} names nobody: give 'all', or beginnings of names joined by commas")
        _whole("--seed", self.seed, 0, 2**31 - 1)
        _one_of("--dtype", self.dtype, DTYPES)
        _one_of("--cache", self.cache, CACHE_STATES)
        if self.dense is not None:
            _one_of("--dense", self.dense, DTYPES)
        _ = self.shape, self.resolved_recipe

    @property
    def shape(self) -> AttentionShape:
        """The layer's shape."""
        return AttentionShape(self.batch, self.heads, self.kv_heads or self.heads, self.dim)

    @property
    def resolved_recipe(self) -> Recipe:
        """The recipe with its open numbers decided by the budget."""
        return self.recipe_at(self.seq, self.shape)

    def recipe_at(self, context: int, shape: AttentionShape) -> Recipe:
        """Return the recipe as solved for another context and shape."""
        return resolve(self.recipe, self.compress, context, shape, self.dtype, self.sinks, self.window, self.anchor_every)


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UsageError(f"{name}={value} is out of range: {low} to {high} is accepted")


def _whole(name: str, value: int, low: int, high: int) -> None:
    if not is_whole(value):
        raise UsageError(f"{name}={value} is not a whole number: {low} to {high} is accepted")
    _within(name, value, low, high)


def _one_of(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise UsageError(f"{name}={value} is unknown: choose {', '.join(accepted)}")
