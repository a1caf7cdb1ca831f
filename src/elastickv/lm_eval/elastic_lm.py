"""The model `elastickv` of lm-evaluation-harness: a causal language model whose decodes read an elastic cache.

After lm-evaluation-harness 0.4.13, `lm_eval/models/huggingface.py` and `lm_eval/api/registry.py`.
"""

import copy
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from elastickv.errors import UsageError
from elastickv.transformers.cache import ElasticCache
from elastickv.transformers.cache_argument import CACHE_ARGUMENT
from elastickv.transformers.context_manager import elastic
from elastickv.transformers.model_loading import load_model

# The harness's names of dtypes beside our own.
_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
# Arguments of the harness's `hf` that it uses with a model that is loaded already.
HARNESS_ARGUMENTS = (
    "add_bos_token",
    "backend",
    "batch_size",
    "chat_template_args",
    "enable_thinking",
    "logits_cache",
    "max_batch_size",
    "max_length",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "truncation",
)
Request = tuple[tuple[str, str] | None, Sequence[int], Sequence[int]]


@register_model("elastickv")
class ElasticLM(HFLM):  # type: ignore[misc]
    """A model of Transformers with an `ElasticCache`.

    Generation is `generate` with the cache. For log-likelihoods the context, apart from its last token, is read with exact
    attention in one pass, and the continuation token by token through the cache: every scored prediction is a decode. So is
    that of each token of a rolling log-likelihood, whose context is one token.

    Parameters
    ----------
    pretrained : a model's folder, a .gguf file or a hub id; weights are never unpickled, and no code of the model's is run.
    compress, recipe, calibration, context, stored_bits : as in `ElasticCache.for_model`; a recipe with commas is read from a
        file.
    dtype : 'fp32', 'fp16' or 'bf16', or PyTorch's name of these; by default bf16 on a GPU and fp32 elsewhere.
    device : 'cpu' or 'cuda'; a GPU by default. Where there is none: the CPU.
    **harness : `batch_size` (of generation), `max_length`, `add_bos_token` and the other `HARNESS_ARGUMENTS`, as the harness's
        `hf` takes them.

    Raises
    ------
    UsageError : before anything is evaluated, if an argument is unknown, the model cannot be loaded, or the cache's options do
        not fit it.
    """

    def __init__(
        self,
        pretrained: str,
        compress: float | None = None,
        recipe: str | None = None,
        calibration: str | None = None,
        context: int | None = None,
        dtype: str | None = None,
        device: str | None = None,
        stored_bits: float | None = None,
        **harness: Any,
    ) -> None:
        if unknown := sorted(set(harness) - set(HARNESS_ARGUMENTS)):
            ours = [name for name in signature(type(self)).parameters if name != "harness"]
            raise UsageError(
                f"{', '.join(unknown)}: no such argument of the model; give {', '.join((*ours, *HARNESS_ARGUMENTS))}"
            )
        if compress is None and recipe is None and stored_bits is None:
            raise UsageError("`compress` is missing in the model's arguments: give for example pretrained=MODEL,compress=4")
        # The harness names a GPU where no device was named, and its `hf` uses the CPU then if there is none.
        device = (device or "cuda") if torch.cuda.is_available() else "cpu"
        dtype = dtype or ("fp32" if device == "cpu" else "bf16")
        loaded = load_model(str(pretrained), _DTYPES.get(dtype, dtype), device)
        options: dict[str, Any] = {"compress": compress, "recipe": recipe, "calibration": calibration, "context": context}
        options["stored_bits"] = stored_bits
        self._options = {name: value for name, value in options.items() if value is not None}
        ElasticCache.for_model(loaded.model, **self._options)
        super().__init__(pretrained=loaded.model, tokenizer=loaded.tokenizer, **harness)

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **generation: Any) -> Any:
        with elastic(self.model, **self._options):
            return super()._model_generate(context, max_length, stop, **generation)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether it is the greedy continuation) of each request, in their order.

        A context that several continuations share is read once. What exceeds the model's length is cut off from the left, as
        the harness's `hf` does.
        """
        by_context: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            most = max(1, self.max_length + 1 - len(continuation))
            by_context.setdefault(tuple(context[-most:]), []).append(number)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for context, numbers in by_context.items():
                cache = self._read(context[:-1])
                for number in numbers:
                    own = copy.deepcopy(cache) if number != numbers[-1] else cache
                    text, _, continuation = requests[number]
                    answers[number] = self._followed(own, context[-1], continuation)
                    if text is not None:
                        self.cache_hook.add_partial("loglikelihood", text, answers[number])
                    bar.update(1)
        return answers

    def _read(self, ids: Sequence[int]) -> ElasticCache:
        """Return a cache that holds these tokens, exact until the first decode."""
        cache = ElasticCache.for_model(self.model, prefill="exact", **self._options)
        if ids:
            self._logits(ids, cache)
        return cache

    def _followed(self, cache: ElasticCache, last: int, continuation: Sequence[int]) -> tuple[float, bool]:
        total, greedy, token = 0.0, True, last
        for following in continuation:
            predicted = self._logits([token], cache).log_softmax(-1)
            total += float(predicted[following])
            greedy = greedy and int(predicted.argmax()) == following
            token = following
        return total, greedy

    def _logits(self, ids: Sequence[int], cache: ElasticCache) -> Any:
        """Return the (vocabulary,) float32 logits after these tokens."""
        with torch.inference_mode():
            inputs = torch.tensor([list(ids)], device=self.device)
            logits = self.model(input_ids=inputs, logits_to_keep=1, use_cache=True, **{CACHE_ARGUMENT: cache}).logits
            return logits[0, -1].float()
