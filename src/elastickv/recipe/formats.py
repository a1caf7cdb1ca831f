"""The storage formats of K and V: bits, codes, scales, and the numbers under which kernels know them.

`FORMATS` is the only table of formats. Recipe texts, byte counts, quantizers, and the layouts and compile-time macros of both
backends read it.
"""

from dataclasses import dataclass
from enum import Enum

ROW_ALIGNMENT_BYTES = 16
SECTOR_BYTES = 32
DENSE_BYTES_PER_ELEMENT = 2
PAGE_TOKENS = 32
MIN_VALUE_GROUP = 32
_SCALE_BYTES = 2  # every scale and every zero is a 16-bit float
_SCALE_CHANNELS = 32
FLOAT16_MAX = 65504.0


class ScaleLayout(Enum):
    """What shares one scale.

    `CHANNEL` and `GROUP` store a zero beside each scale: number = scale * code + zero. The others have no zero.
    """

    NONE = "none"  # the codes are 16- or 32-bit floats
    TOKEN = "token"  # one bfloat16 scale for each token
    PAGE = "page"  # one bfloat16 scale for each page of 32 tokens
    CHANNEL = "channel"  # a float16 scale and zero for each channel of each page; the page scorers read them
    GROUP = "group"  # a bfloat16 scale and zero for each token and group of channels

    @property
    def by_row(self) -> bool:
        """Whether a single row can be stored on its own, without the other rows of its page."""
        return self in (ScaleLayout.NONE, ScaleLayout.TOKEN, ScaleLayout.GROUP)


@dataclass(frozen=True)
class Scales:
    """The size of a scale plane: `n_bytes` for every `tokens` tokens of one KV head."""

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
    keys, values : what shares a scale, in K and in V; None: it stores no values.
    signed : whether codes are signed integers.
    largest_code : the largest code (of fp8, the largest element that a code stands for); 0 for plain floats.
    largest_key : the largest magnitude of a cold key that can be stored; None where there is no limit but the dtype's own.
    packed : how many rows are packed, and padded to 16 bytes, together; keys are padded to a multiple of so many channels.
    cold : whether a recipe may name it; else only a model's dtype may be it.
    cpu_id : number in the CPU kernels; None: no CPU kernel reads it.
    cuda_id : value of the CUDA macros K_FORMAT and V_FORMAT (`kernels/format_codecs.cuh`); None: no kernel reads pages of it.
    cuda_rows : value of the CUDA macro COLD_TYPE (`kernels/common.cuh`) of the kernels that read rows of it; None: they do not.
    cuda_dtype : value of the CUDA macro EXACT_TYPE (`kernels/common.cuh`), for the dtypes of a model.
    """

    name: str
    bits: int
    keys: ScaleLayout = ScaleLayout.NONE
    values: ScaleLayout | None = ScaleLayout.NONE
    signed: bool = False
    largest_code: float = 0
    largest_key: float | None = None
    packed: int = 1
    cold: bool = True
    cpu_id: int | None = None
    cuda_id: int | None = None
    cuda_rows: int | None = None
    cuda_dtype: int | None = None

    @property
    def is_float(self) -> bool:
        """Whether elements are stored as 16- or 32-bit floats, without scales."""
        return self.keys is ScaleLayout.NONE

    @property
    def is_integer(self) -> bool:
        """Whether codes are whole numbers: what they stand for is evenly spaced, from a scale, with or without a zero."""
        return not self.is_float and self.keys is not ScaleLayout.PAGE

    @property
    def by_row(self) -> bool:
        """Whether single rows of K and V can be stored: what stores every n-th row needs that."""
        return all(layout is not None and layout.by_row for layout in (self.keys, self.values))

    def row_bytes(self, head_dim: int) -> int:
        """Bytes of one stored row without its scale; rows that are packed together are padded together.

        They are padded to 16 bytes, so that every load is a full vector.
        """
        return round_up(self.packed * -(-head_dim * self.bits // 8), ROW_ALIGNMENT_BYTES) // self.packed

    def key_row_bytes(self, head_dim: int) -> int:
        """Bytes of one stored key without its scale."""
        return self.row_bytes(round_up(head_dim, self.packed))

    def key_scales(self, head_dim: int) -> Scales:
        """Size of K's scales; where rows are padded one by one, channels are padded to 32."""
        return _scales(self.keys, round_up(head_dim, _SCALE_CHANNELS) if self.packed == 1 else head_dim, 1)

    def value_scales(self, head_dim: int, group: int) -> Scales:
        """Size of V's scales, where `group` channels share one."""
        return _scales(self.values or ScaleLayout.NONE, head_dim, head_dim // group)


def _scales(layout: ScaleLayout, channels: int, groups: int) -> Scales:
    return {
        ScaleLayout.NONE: Scales(0, 1),
        ScaleLayout.TOKEN: Scales(_SCALE_BYTES, 1),
        ScaleLayout.PAGE: Scales(_SCALE_BYTES, PAGE_TOKENS),
        ScaleLayout.CHANNEL: Scales(2 * _SCALE_BYTES * channels, PAGE_TOKENS),
        ScaleLayout.GROUP: Scales(2 * _SCALE_BYTES * groups, 1),
    }[layout]


_TOKEN, _PAGE, _CHANNEL, _GROUP = ScaleLayout.TOKEN, ScaleLayout.PAGE, ScaleLayout.CHANNEL, ScaleLayout.GROUP
FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("fp32", 32, cold=False, cpu_id=0, cuda_dtype=0),
        Format("bf16", 16, cpu_id=2, cuda_id=0, cuda_rows=1, cuda_dtype=2),
        Format("fp16", 16, cpu_id=1, cuda_id=0, cuda_rows=1, cuda_dtype=1),
        Format("fp8", 8, _PAGE, _PAGE, largest_code=448, cpu_id=4, cuda_id=2),
        Format("int8", 8, _TOKEN, _TOKEN, signed=True, largest_code=127, cpu_id=3, cuda_id=1, cuda_rows=2),
        Format("int4", 4, _CHANNEL, _GROUP, largest_code=15, largest_key=FLOAT16_MAX, cpu_id=5, cuda_id=3),
        Format("int8_per_channel", 8, _CHANNEL, None, largest_code=255, largest_key=FLOAT16_MAX, cpu_id=6, cuda_id=4),
        Format("int3", 3, _CHANNEL, _GROUP, largest_code=7, largest_key=FLOAT16_MAX, packed=PAGE_TOKENS, cpu_id=7),
        Format("int2", 2, _CHANNEL, _GROUP, largest_code=3, largest_key=FLOAT16_MAX, packed=16, cpu_id=8),
    )
}
DTYPES: tuple[str, ...] = ("fp32", "fp16", "bf16")  # of models


def cold_formats() -> tuple[str, ...]:
    """Return the formats that a recipe may name."""
    return tuple(f.name for f in FORMATS.values() if f.cold)


def unread_formats(device: str | None) -> tuple[str, ...]:
    """Return the formats that the kernels of a kind of device, 'cpu' or 'cuda', do not read; None: of either."""
    return tuple(
        f.name
        for f in FORMATS.values()
        if (f.cpu_id is None and device != "cuda") or (f.cuda_id is None and f.cold and device != "cpu")
    )


def round_up(value: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def sixteen_bit(dtype: str) -> str:
    """Return the 16-bit dtype that stores a model of `dtype`: its own, or bf16."""
    return "bf16" if dtype == "fp32" else dtype


def sectors(n_bytes: int) -> int:
    """Return the bytes that DRAM moves for a contiguous read: whole 32-byte sectors."""
    return round_up(n_bytes, SECTOR_BYTES)


def value_groups(head_dim: int) -> tuple[int, ...]:
    """Return the groups of V channels that can share a scale: divisors of `head_dim` from 32 up to the whole head."""
    return tuple(n for n in range(MIN_VALUE_GROUP, head_dim + 1) if head_dim % n == 0)
