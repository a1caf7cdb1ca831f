"""The published KV formats by name. A new one is a file beside this one and a line here."""

from collections.abc import Sequence

from elastickv.errors import UsageError
from elastickv.evaluation.evaluation_options import REFERENCE
from elastickv.evaluation.kv_formats import (
    gguf_blocks,
    kivi,
    kvarn,
    microscaling,
    per_channel_floats,
    per_token_head,
    turboquant,
    turboquant_presets,
)
from elastickv.evaluation.kv_formats.own_formats import NamedRecipes
from elastickv.evaluation.kv_formats.reference_format import ReferenceFormat
from elastickv.inputs import file_exists
from elastickv.recipe.formats import FORMATS, cold_formats

PUBLISHED: dict[str, ReferenceFormat] = {
    published.name: published
    for published in (
        per_token_head.FP8_PER_TENSOR,
        per_token_head.FP8_PER_TENSOR_CALIBRATED,
        per_token_head.FP8_PER_TOKEN_HEAD,
        per_token_head.INT8_PER_TOKEN_HEAD,
        per_token_head.INT4_PER_TOKEN_HEAD,
        per_token_head.INT4_PER_TOKEN_HEAD_UNROTATED,
        gguf_blocks.Q8_0,
        gguf_blocks.Q8_0_ROTATED,
        gguf_blocks.Q4_0,
        gguf_blocks.Q4_0_ROTATED,
        kivi.KIVI2,
        kivi.KIVI4,
        kivi.KIVI2_R32,
        kivi.KIVI4_R32,
        turboquant.TURBOQUANT2,
        turboquant.TURBOQUANT3,
        turboquant.TURBOQUANT4,
        turboquant.TURBOQUANT2_QJL,
        turboquant.TURBOQUANT3_QJL,
        turboquant.TURBOQUANT4_QJL,
        turboquant_presets.TURBOQUANT_K8V4,
        turboquant_presets.TURBOQUANT_4BIT_NC,
        turboquant_presets.TURBOQUANT_K3V4_NC,
        turboquant_presets.TURBOQUANT_3BIT_NC,
        microscaling.NVFP4,
        microscaling.NVFP4_CALIBRATED,
        microscaling.MXFP4,
        kvarn.KVARN_K4V2,
        kvarn.KVARN_K4V4,
        kvarn.KVARN_K4V4_PLAIN,
        per_channel_floats.FP8_PER_CHANNEL,
        per_channel_floats.FP8_PER_CHANNEL_CENTERED,
    )
}
ALL = "all"


def parse_formats(lists: Sequence[str]) -> tuple[str, ...]:
    """Return the names and recipes of several lists, each once.

    Parameters
    ----------
    lists : each is names, separated by commas, or a single recipe, or a file of recipes by layer. `all` stands for the
        published formats and our own. Recipes and files behind `reference:` are measured in PyTorch, without their kernels.

    Raises
    ------
    UsageError : naming what is neither.
    """
    names: list[str] = []
    for text in lists:
        for name in [text] if "=" in text else text.split(","):
            names += [*PUBLISHED, *_own_formats()] if name.strip() == ALL else [name.strip()]
    for name in names:
        format_of(name)
    return tuple(dict.fromkeys(names))


def format_of(name: str) -> ReferenceFormat | NamedRecipes:
    """Return the published format, or the recipes, that a name stands for.

    Raises
    ------
    UsageError : if it is neither.
    """
    if name in PUBLISHED:
        return PUBLISHED[name]
    try:
        return NamedRecipes.of(name)
    except UsageError as error:
        text = name.removeprefix(REFERENCE)
        if "=" in text or text in FORMATS or file_exists(text):
            raise
        if text in PUBLISHED:
            raise UsageError(f"format {name} is no recipe: published formats are references, write {text}") from error
        accepted = ", ".join([ALL, *PUBLISHED, *_own_formats()])
        raise UsageError(f"format {text or 'without a name'} is unknown: choose {accepted}, or write a recipe") from error


def _own_formats() -> list[str]:
    """Return our quantized formats, one that stores keys only with int8 values."""
    quantized = [FORMATS[name] for name in cold_formats() if not FORMATS[name].is_float]
    return [f"k={f.name},v=int8" if f.values is None else f.name for f in quantized]
