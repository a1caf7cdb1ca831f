"""How the rows (one token of one KV head) of K and V are stored."""

from dataclasses import dataclass

ROW_ALIGNMENT_BYTES = 16
SECTOR_BYTES = 32
DENSE_BYTES_PER_ELEMENT = 2


@dataclass(frozen=True)
class Scales:
    """What turns codes back into numbers, in a plane of its own: `n_bytes` for every `tokens` tokens of one KV head."""

    n_bytes: int
    tokens: int

    def bytes_of(self, rows: int) -> int:
        """Bytes for `rows` tokens."""
        return -(-rows // self.tokens) * self.n_bytes


@dataclass(frozen=True)
class Format:
    """A storage format.

    Attributes
    ----------
    name : the word used in recipe texts.
    bits : bits per element.
    """

    name: str
    bits: int

    def row_bytes(self, head_dim: int) -> int:
        """Bytes of one stored row without its scale, padded to 16 bytes so that every load is a full vector."""
        return round_up(-(-head_dim * self.bits // 8), ROW_ALIGNMENT_BYTES)

    def key_scales(self, head_dim: int) -> Scales:
        """Scales of K: int4 a fp16 scale and zero per channel (padded as the row is) and page; the others as V."""
        if self.name == "int4":
            return Scales(4 * (self.row_bytes(head_dim) * 8 // self.bits), PAGE_TOKENS)
        return self.value_scales(head_dim, head_dim)

    def value_scales(self, head_dim: int, group: int) -> Scales:
        """Scales of V, all bf16: int8 one per token; fp8 a power of two per page; int4 scale and zero per token and group."""
        if self.name == "int8":
            return Scales(2, 1)
        if self.name == "fp8":
            return Scales(2, PAGE_TOKENS)
        return Scales(4 * (head_dim // group) if self.name == "int4" else 0, 1)


def round_up(value: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def sixteen_bit(dtype: str) -> str:
    """Return the 16-bit dtype in which a model of `dtype` is kept: its own, or bf16."""
    return "bf16" if dtype == "fp32" else dtype


def sectors(n_bytes: int) -> int:
    """Return the bytes that DRAM moves for a contiguous read: whole 32-byte sectors."""
    return round_up(n_bytes, SECTOR_BYTES)


PAGE_TOKENS = 32
MIN_VALUE_GROUP = 32
_ALL = (Format("fp32", 32), Format("fp16", 16), Format("bf16", 16), Format("fp8", 8), Format("int8", 8), Format("int4", 4))
FORMATS: dict[str, Format] = {f.name: f for f in _ALL}
DTYPES: tuple[str, ...] = ("fp32", "fp16", "bf16")
COLD_FORMATS: tuple[str, ...] = ("bf16", "fp16", "fp8", "int8", "int4")


def value_groups(head_dim: int) -> tuple[int, ...]:
    """Return the groups of V channels that can share an int4 scale: divisors of `head_dim` from 32 up to the whole head."""
    return tuple(n for n in range(MIN_VALUE_GROUP, head_dim + 1) if head_dim % n == 0)
