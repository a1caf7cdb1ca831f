"""What a KV format is to an evaluation: how it rounds keys and values, how many bytes that takes, and which tokens stay exact.

One rule holds for all formats. A step reads its own token and everything before it. The first `sinks` tokens stay exact. The
tokens after them are stored in blocks of consecutive tokens, each as soon as all of its tokens are older than the newest
`window` ones. A published format has the sinks, blocks and windows of its publication; `with_exact` gives all formats the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from elastickv.errors import UsageError
from elastickv.evaluation.exact_tokens import ExactTokens
from elastickv.evaluation.prefill import Tensor
from elastickv.recipe.formats import DENSE_BYTES_PER_ELEMENT

_LEAST_SCALE = 1e-30
_LAYER_SCALE_BYTES = 4


def _nothing(head_dim: int) -> int:
    return 0


@dataclass(frozen=True)
class StoredPlane:
    """How the keys, or the values, of one KV head are stored.

    Attributes
    ----------
    round_trip : (..., tokens, head_dim) float32 -> the numbers that are read back; tokens are a multiple of `group`.
    group_bytes : head_dim -> bytes of `group` tokens: codes, scales and zeros.
    group : consecutive tokens that share scales.
    block : consecutive tokens that are stored at once; None: as `group`.
    window : the newest tokens, which a step reads exactly; its own token is one of them.
    channels : a head's channels must be a multiple of it.
    calibrated_to : the largest number that the codes stand for, where a layer has a scale that maps its largest number to it:
        a float32 for all tokens, from the first tokens that are stored. None: no such scale.
    """

    round_trip: Callable[[Tensor], Tensor]
    group_bytes: Callable[[int], int]
    group: int = 1
    block: int | None = None
    window: int = 0
    channels: int = 1
    calibrated_to: float | None = None

    def layer_scale(self, first: Tensor) -> Tensor | None:
        """Return the scale that the first tokens of a layer set for all of them."""
        return None if self.calibrated_to is None else (first.abs().amax() / self.calibrated_to).clamp_min(_LEAST_SCALE)

    def read_back(self, x: Tensor, layer_scale: Tensor | None) -> Tensor:
        """Return (..., tokens, head_dim) float32 numbers as they are read after they were stored."""
        return self.round_trip(x) if layer_scale is None else self.round_trip(x / layer_scale) * layer_scale

    def stored_tokens(self, tokens: int, sinks: int) -> int:
        """Return how many of `tokens` tokens are in the format; they follow the sinks."""
        block = self.block or self.group
        return max(0, tokens - sinks - self.window) // block * block

    def head_bytes(self, tokens: int, sinks: int, head_dim: int) -> int:
        """Return the bytes of one KV head with `tokens` tokens; exact ones take 2 bytes an element."""
        stored = self.stored_tokens(tokens, sinks)
        return stored // self.group * self.group_bytes(head_dim) + (tokens - stored) * head_dim * DENSE_BYTES_PER_ELEMENT


@dataclass(frozen=True)
class ReferenceFormat:
    """A published KV format.

    Attributes
    ----------
    name : as `elastickv eval` takes it.
    source : the publication, and the repository and file that were followed.
    sinks : the first tokens, which are never quantized.
    shared_bytes : head_dim -> bytes of what K and V of all layers share: codebooks and random matrices.
    outer_layers : so many of a model's first layers, and of its last ones, are not quantized; they count as 16 bit.
    """

    name: str
    keys: StoredPlane
    values: StoredPlane
    source: str
    sinks: int = 0
    shared_bytes: Callable[[int], int] = _nothing
    outer_layers: int = 0

    def exact_layers(self, layers: int) -> frozenset[int]:
        """Return the numbers of the layers that are not quantized: never more than half of them at either end."""
        outer = min(self.outer_layers, layers // 2)
        return frozenset([*range(outer), *range(layers - outer, layers)])

    def with_exact(self, exact: ExactTokens) -> "ReferenceFormat":
        """Return the format with the sinks and the window that all formats of a comparison have."""
        keys, values = (replace(plane, window=exact.window, block=None) for plane in (self.keys, self.values))
        return replace(self, keys=keys, values=values, sinks=exact.sinks)

    def check_head(self, head_dim: int) -> None:
        """Refuse heads that the format cannot divide into its groups.

        Raises
        ------
        UsageError : naming the format.
        """
        channels = max(self.keys.channels, self.values.channels)
        if head_dim % channels:
            raise UsageError(
                f"format {self.name} needs heads of a multiple of {channels} channels, not of {head_dim}: leave it out"
            )

    def bits_per_element(self, head_dim: int) -> float:
        """Return the bits of a quantized element of K and V, with its share of scales and zeros."""
        planes = (self.keys, self.values)
        return 4 * sum(plane.group_bytes(head_dim) / (plane.group * head_dim) for plane in planes)

    def stored_bytes(self, tokens: int, head_dim: int, kv_heads: int, layers: int, exact_layers: int = 0) -> int:
        """Return the bytes of one sequence in all layers, exact tokens and shared bytes included.

        Parameters
        ----------
        layers : those with full attention; `exact_layers` of them count as 16 bit.
        """
        planes = (self.keys, self.values)
        heads = kv_heads * sum(plane.head_bytes(tokens, self.sinks, head_dim) for plane in planes)
        scales = sum(_LAYER_SCALE_BYTES for plane in planes if plane.calibrated_to is not None)
        exact = exact_layers * 2 * kv_heads * tokens * head_dim * DENSE_BYTES_PER_ELEMENT
        return exact + (layers - exact_layers) * (heads + scales) + self.shared_bytes(head_dim)
