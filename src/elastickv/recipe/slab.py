"""The page of one KV head in a serving engine's block."""

from dataclasses import dataclass

from elastickv.recipe.formats import FORMATS, PAGE_TOKENS, ROW_ALIGNMENT_BYTES, round_up
from elastickv.recipe.recipe import Recipe

LAYOUT_VERSION = 1
"""Raised where bytes of a page or of the window come to mean something else, so that no stored page is read as another."""


@dataclass(frozen=True)
class Slab:
    """Sizes of the page of one KV head, contiguous: codes of K, scales of K, codes of V, scales of V.

    Attributes
    ----------
    key_codes, key_scales, value_codes, value_scales : bytes of the parts, each padded to 16.
    """

    key_codes: int
    key_scales: int
    value_codes: int
    value_scales: int

    @classmethod
    def of(cls, recipe: Recipe, head_dim: int) -> "Slab":
        """Return the slab of a recipe's formats.

        Raises
        ------
        ValueError : if the recipe is dense.
        """
        if recipe.key_format is None or recipe.value_format is None:
            raise ValueError(f"{recipe} has no pages")
        key, value = FORMATS[recipe.key_format], FORMATS[recipe.value_format]
        scales = (key.key_scales(head_dim), value.value_scales(head_dim, recipe.v_group(head_dim)))
        key_scales, value_scales = (round_up(each.bytes_of(PAGE_TOKENS), ROW_ALIGNMENT_BYTES) for each in scales)
        key_codes, value_codes = PAGE_TOKENS * key.key_row_bytes(head_dim), PAGE_TOKENS * value.row_bytes(head_dim)
        return cls(key_codes, key_scales, value_codes, value_scales)

    @property
    def keys(self) -> tuple[slice, slice]:
        """Bytes of the codes and of the scales of K."""
        return slice(self.key_codes), slice(self.key_codes, self.key_codes + self.key_scales)

    @property
    def values(self) -> tuple[slice, slice]:
        """Bytes of the codes and of the scales of V."""
        first = self.key_codes + self.key_scales
        scales = first + self.value_codes
        return slice(first, scales), slice(scales, scales + self.value_scales)

    @property
    def n_bytes(self) -> int:
        """Bytes of the slab."""
        return self.key_codes + self.key_scales + self.value_codes + self.value_scales
