"""What an engine's decodes read, by the configuration that the process has which schedules them."""

from functools import partial
from typing import Any

from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from elastickv.transformers.torch_dtypes import DTYPE_NAMES
from elastickv.vllm.layer_formats import ServedModel, layer_recipes
from elastickv.vllm.metrics.decode_reads import DecodeReads
from elastickv.vllm.selection.ratio_shares import RatioShares
from elastickv.vllm.serving_options import ServingOptions, recipe_of


def served_reads(config: Any, kv_cache_config: Any) -> DecodeReads:
    """Return the reads of an engine's model, without those of a drafter and of layers in a stock backend.

    Parameters
    ----------
    config : vLLM's.
    kv_cache_config : the scheduler's.
    """
    options = ServingOptions.parse(config.additional_config) or ServingOptions()
    default, device = recipe_of(options, config.cache_config.cache_dtype), "cpu" if current_platform.is_cpu() else "cuda"
    model_config, layers = config.model_config, served_layers(config, kv_cache_config)
    model = ServedModel.of(config, model_config.get_head_size(), DTYPE_NAMES[model_config.dtype], device)
    recipes = layer_recipes(options, default, layers, model)

    own, shares = {layer: recipes[layer] for layer in layers}, RatioShares(recipes, model)
    longest = model.context + 1 + config.num_speculative_tokens
    return DecodeReads(own, model.shape, model.layer_count, longest, partial(shares.of_layers, layers))


def served_layers(config: Any, kv_cache_config: Any) -> list[int]:
    """Return the numbers of the model's layers that store pages; those of other pipeline stages are known by their kind."""
    pages = [group for group in kv_cache_config.kv_cache_groups if getattr(group.kv_cache_spec, "sliding_window", None) is None]
    count = config.model_config.get_total_num_hidden_layers()
    # A drafter's layers have numbers of their own, or those that follow the model's.
    numbers = {extract_layer_index(name) for group in pages for name in group.layer_names} & set(range(count))
    if config.parallel_config.pipeline_parallel_size > 1:  # of which vLLM tells the scheduler the first stage's layers
        kinds = getattr(config.model_config.hf_text_config, "layer_types", None) or [None] * count
        numbers = {number for number in range(count) if kinds[number] in {kinds[known] for known in numbers}}
    return sorted(numbers)
