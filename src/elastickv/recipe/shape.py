"""The shape of one layer's decode attention."""

from dataclasses import dataclass
from numbers import Integral
from typing import Any

from elastickv.errors import UsageError

HEAD_DIMS: tuple[int, ...] = (64, 80, 96, 112, 128, 192, 256)
MAX_CONTEXT = 1 << 20
MAX_GROUP = 256
MAX_ROWS = 65535


def is_whole(value: Any) -> bool:
    """Whether a number is whole by its type, NumPy's among them; True and False are not."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def padded_head_dim(head_dim: int) -> int:
    """Return the smallest head size, from `head_dim` up, that the kernels are built for; the added channels are zeros.

    Raises
    ------
    UsageError : if the head is larger than all of them.
    """
    fitting = [size for size in HEAD_DIMS if size >= head_dim]
    if not fitting:
        raise UsageError(f"heads of {head_dim} channels are not supported: at most {max(HEAD_DIMS)} are")
    return min(fitting)


@dataclass(frozen=True)
class AttentionShape:
    """Batch, heads and head size of one layer.

    Attributes
    ----------
    batch : sequences decoded together.
    query_heads : query heads; a multiple of `kv_heads`.
    kv_heads : KV heads; `query_heads == kv_heads` is MHA, 1 is MQA.
    head_dim : elements of one head; one of `HEAD_DIMS`.

    Raises
    ------
    UsageError : if a size is not positive, the heads do not divide, or no kernel is built for `head_dim`.
    """

    batch: int
    query_heads: int
    kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        for name in ("batch", "query_heads", "kv_heads"):
            if not is_whole(getattr(self, name)) or getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}: give a whole number from 1 up")
        if self.query_heads % self.kv_heads:
            raise UsageError(
                f"{self.query_heads} query heads are not a multiple of {self.kv_heads} KV heads: "
                "every KV head serves the same number of query heads"
            )
        if self.head_dim not in HEAD_DIMS:
            raise UsageError(f"head_dim {self.head_dim} has no kernel: supported are {', '.join(map(str, HEAD_DIMS))}")
        if self.group > MAX_GROUP or self.batch * self.kv_heads > MAX_ROWS:
            raise UsageError(
                f"{self.batch} sequences x {self.kv_heads} KV heads with {self.group} query heads each is too large: "
                f"at most {MAX_ROWS} (sequence, KV head) pairs and {MAX_GROUP} query heads to a KV head"
            )

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.query_heads // self.kv_heads
