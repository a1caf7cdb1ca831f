"""The macros by which kernels know the storage formats, from `recipe/formats.py`."""

from collections.abc import Mapping

from elastickv.recipe.formats import FORMATS, PAGE_TOKENS, Format, ScaleLayout


def format_macros(macros: Mapping[str, int]) -> dict[str, int]:
    """Return the macros about formats for a build with `macros`; none for a kernel that stores and reads no tokens.

    - `FP32`, `FP16`, `BF16`: values of EXACT_TYPE.
    - `COLD_SAME`, `COLD_INT8`: values of COLD_TYPE for rows.
    - `SIXTEEN_BIT`, `INT8`, ...: values of K_FORMAT and V_FORMAT; `INT8_LARGEST`, ...: the largest code.
    - In builds for pages, of K and V: bits of an element, bytes of a page's scales, the largest key that can be stored, and of
      keys with scales of channels the largest code.
    """
    if "EXACT_TYPE" not in macros:
        return {}
    derived: dict[str, int] = {}
    for f in FORMATS.values():
        numbers = {
            f.name.upper(): f.cuda_dtype,
            "COLD_SAME" if f.is_float else f"COLD_{f.name.upper()}": f.cuda_rows,
            "SIXTEEN_BIT" if f.is_float else f.name.upper(): f.cuda_id,
            f"{f.name.upper()}_LARGEST": None if f.is_float or f.cuda_id is None else int(f.largest_code),
        }
        derived |= {name: number for name, number in numbers.items() if number is not None}
    if "K_FORMAT" in macros:
        dim, key, value = macros["HEAD_DIM"], format_of(macros["K_FORMAT"]), format_of(macros["V_FORMAT"])
        derived |= {
            "K_BITS": key.bits,
            "V_BITS": value.bits,
            "KEY_SCALES": key.key_scales(dim).bytes_of(PAGE_TOKENS),
            "VALUE_SCALES": value.value_scales(dim, macros["V_GROUP"]).bytes_of(PAGE_TOKENS),
            "LARGEST_KEY": int(key.largest_key or 0),
            "CHANNEL_LEVELS": int(key.largest_code) if key.keys is ScaleLayout.CHANNEL else 0,
        }
    return derived


def format_of(cuda_id: int) -> Format:
    """Return the format of a page with this number; of the 16-bit dtypes, which share one, either."""
    return next(f for f in FORMATS.values() if f.cuda_id == cuda_id)
