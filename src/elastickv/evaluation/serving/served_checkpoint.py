"""A model that vLLM serves, of which nothing but the configuration and the tokenizer is read in this process."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from elastickv.errors import UsageError
from elastickv.evaluation.recipes_by_ratio import Span, measured
from elastickv.evaluation.serving.engine_options import EngineOptions
from elastickv.recipe import AttentionShape, Recipe
from elastickv.transformers.model_loading import Checkpoint
from elastickv.transformers.model_support import sizes_of_config
from elastickv.transformers.torch_dtypes import DTYPE_NAMES, torch_dtype
from elastickv.vllm.checkpoint_fingerprint import checkpoint_fingerprint, checkpoint_folder
from elastickv.vllm.layer_formats import ServedModel, layer_recipes
from elastickv.vllm.serving_options import KEY, ServingOptions, recipe_of

_BACKEND = "ELASTICKV"
_GIB = 2**30
_TRIES, _MARGIN = 8, 1.001
_UNMET_REMEDY = f"give a smaller `compress`, a longer `context` or `needle`, or in `engine_options` a smaller window of {KEY}"


@dataclass(frozen=True)
class ServedPath:
    """One way to serve.

    Attributes
    ----------
    name : as in results: C=8, or a page format.
    ratio : C; None for a page format.
    serving : options of ElasticKV.
    """

    name: str
    ratio: float | None
    serving: dict[str, Any]


class ServedCheckpoint:
    """A model's files, and how vLLM is started with them.

    Parameters
    ----------
    name : path of a folder, or hub id.
    dtype : 'fp32', 'fp16' or 'bf16'; None: fp32 on CPUs, on GPUs the model's own if it has 16 bits, else bf16.
    device : the kind of device that serves, 'cpu' or 'cuda'.
    calibration : path of a calibration file, or None.

    Attributes
    ----------
    dtype : as given, or the default.
    options : as given.
    shape : of one sequence of a layer with full attention.
    elastic : numbers of these layers.
    positions : the model's longest context in tokens, or None.

    Raises
    ------
    UsageError : if there is no such model, or it has no layer with full attention.
    """

    def __init__(self, name: str, dtype: str | None, device: str, options: EngineOptions, calibration: Path | None) -> None:
        if name.lower().endswith(".gguf"):
            raise UsageError(
                f"model {name}: vLLM reads no .gguf file: give a folder of Transformers (docs/fidelity.md says how)"
            )
        self.checkpoint, self.device, self.options, self._calibration = Checkpoint(name), device, options, calibration
        self._text = self.checkpoint.config.get_text_config(decoder=True)
        self._sizes = sizes_of_config(self._text, f"model {self.name}")
        if not self._sizes.elastic:
            raise UsageError(f"every layer of {self.name} attends to a window, so nothing is compressed: nothing to evaluate")
        self.dtype = dtype or self._usual_dtype()
        torch_dtype(self.dtype)
        if device == "cuda" and self.dtype == "fp32":
            raise UsageError("`dtype`=fp32 is served on CPUs alone: give bf16 or fp16, or leave it out")
        self.head_dim, self.elastic = self._sizes.head_dim, self._sizes.elastic
        self.shape = AttentionShape(1, self._sizes.query_heads, self._sizes.kv_heads, self.head_dim)

    @property
    def name(self) -> str:
        """The last part of the name that the user gave."""
        return Path(self.checkpoint.name).name

    @property
    def layers(self) -> int:
        """Number of layers with full attention."""
        return len(self.elastic)

    @cached_property
    def fingerprint(self) -> str | None:
        """The model's fingerprint; None where its files do not tell it, or are not on this machine."""
        folder = checkpoint_folder(self.checkpoint.name)
        return None if folder is None else checkpoint_fingerprint(folder, self._text)

    def check_room(self, tokens: int) -> None:
        """Refuse more tokens than the model has positions."""
        most = self._sizes.max_positions
        if most is not None and tokens > most:
            raise UsageError(f"{tokens} tokens are needed and {self.name} has {most} positions: give a shorter `context`")

    def described(self) -> dict[str, Any]:
        """Return what the result says of the model."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint or "unknown",
            "dtype": self.dtype,
            "device": self.device,
            "layers": int(self._text.num_hidden_layers),
            "elastic_layers": self.layers,
            "query_heads": self.shape.query_heads,
            "kv_heads": self.shape.kv_heads,
            "head_dim": self.head_dim,
        }

    def of_ratio(self, ratio: float, span: Span, tokens: int) -> ServedPath:
        """Return the path that meets a ratio over a span, by the calibration if there is one.

        An engine meets a ratio for requests of `tokens` tokens, the end of the span or more: it is asked for more than `ratio`.

        Raises
        ------
        UsageError : if it cannot be met, or as `recipes`.
        """
        calibrated = {} if self._calibration is None else {"calibration": str(self._calibration)}
        target = ratio
        for _ in range(_TRIES):
            path = ServedPath(f"C={ratio:g}", ratio, self.options.serving | {"compress": target} | calibrated)
            try:
                recipes = self.recipes(path, tokens)
            except UsageError:
                if target == ratio:
                    raise
                break
            served = [recipes[layer] for layer in self.elastic]
            reached = measured(ratio, served, span, self.shape, self.dtype).read_ratio
            if reached >= ratio:
                return path
            target *= _MARGIN * ratio / reached
        end = span.first + span.steps
        raise UsageError(f"compress={ratio:g} cannot be met over tokens {span.first} to {end}: {_UNMET_REMEDY}")

    def of_format(self, name: str) -> ServedPath:
        """Return the path of a page format, with every page read."""
        others = {option: value for option, value in self.options.serving.items() if option != "select_pages"}
        return ServedPath(name, None, others | {"format": name})

    def recipes(self, path: ServedPath, tokens: int) -> dict[int, Recipe]:
        """Return the recipes of the layers that a path serves requests of at most `tokens` tokens with.

        Raises
        ------
        UsageError : if the options are not accepted, do not fit the model, or cannot be met.
        """
        serving = ServingOptions.parse({KEY: path.serving})
        assert serving is not None
        model = ServedModel(self.shape, int(self._text.num_hidden_layers), tokens, self.dtype, self.device, self.fingerprint)
        return layer_recipes(serving, recipe_of(serving, "auto"), self.elastic, model, _UNMET_REMEDY)

    def arguments(self, path: ServedPath | None, tokens: int) -> dict[str, Any]:
        """Return the arguments of vLLM's `LLM` for requests of at most `tokens` tokens, one at a time.

        Parameters
        ----------
        path : None: vLLM's own backend with a 16-bit cache, or one in the model's dtype.
        """
        eager = {"enforce_eager": True} if self.device == "cpu" else {}  # compiling takes longer than an evaluation
        elastic: dict[str, Any] = {}
        if path is not None:
            elastic = {"additional_config": {KEY: path.serving}}
            elastic |= {} if self.device == "cpu" else {"attention_backend": _BACKEND}
        return {
            **eager,
            **self.options.arguments,
            **elastic,
            "model": self.checkpoint.name,
            "dtype": str(torch_dtype(self.dtype)).removeprefix("torch."),
            "max_model_len": tokens,
            "max_num_seqs": 1,
            "skip_tokenizer_init": True,
            "enable_prefix_caching": False,
            "async_scheduling": False,
            "generation_config": "vllm",
            "seed": 0,
        }

    def variables(self, tokens: int) -> dict[str, str]:
        """Return variables of the engine's environment: on CPUs vLLM would take nearly all memory for its KV cache."""
        if self.device != "cpu":
            return {}
        element = torch_dtype(self.dtype).itemsize
        dense = 2 * int(self._text.num_hidden_layers) * self.shape.kv_heads * self.head_dim * element * tokens
        return {"VLLM_CPU_KVCACHE_SPACE": str(math.ceil(2 * dense / _GIB))}  # a request, its window and spare blocks

    def _usual_dtype(self) -> str:
        if self.device == "cpu":
            return "fp32"
        own = DTYPE_NAMES.get(getattr(self._text, "dtype", None) or getattr(self.checkpoint.config, "dtype", None))
        return own if own in ("bf16", "fp16") else "bf16"
