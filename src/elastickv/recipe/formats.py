"""How one row (one token of one KV head) of K or V is stored."""

from dataclasses import dataclass

ROW_ALIGNMENT_BYTES = 16
SECTOR_BYTES = 32
DENSE_BYTES_PER_ELEMENT = 2


@dataclass(frozen=True)
class Format:
    """A storage format of a K or V row.

    Attributes
    ----------
    name : the word used in recipe texts.
    bits : bits per element.
    scale_bytes : bytes of scale per row, kept in a plane of its own.
    """

    name: str
    bits: int
    scale_bytes: int = 0

    def row_bytes(self, head_dim: int) -> int:
        """Bytes of one stored row without its scale, padded to 16 bytes so that every load is a full vector."""
        return round_up(-(-head_dim * self.bits // 8), ROW_ALIGNMENT_BYTES)


def round_up(value: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def sixteen_bit(dtype: str) -> str:
    """Return the 16-bit dtype in which a model of `dtype` is kept: its own, or bf16."""
    return "bf16" if dtype == "fp32" else dtype


def sectors(n_bytes: int) -> int:
    """Return the bytes that DRAM moves for a contiguous read: whole 32-byte sectors."""
    return round_up(n_bytes, SECTOR_BYTES)


_ALL = (
    Format("fp32", 32),
    Format("fp16", 16),
    Format("bf16", 16),
    # One bf16 scale per token and head: bf16 and not fp16, so that no finite 16-bit input over- or underflows its scale.
    Format("int8", 8, scale_bytes=2),
)
FORMATS: dict[str, Format] = {f.name: f for f in _ALL}
DTYPES: tuple[str, ...] = ("fp32", "fp16", "bf16")
COLD_FORMATS: tuple[str, ...] = ("bf16", "fp16", "int8")
