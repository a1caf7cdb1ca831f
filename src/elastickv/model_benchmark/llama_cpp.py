"""llama.cpp through the prebuilt bindings `xllamacpp`, which are imported on first use."""

import json
from functools import cached_property
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any
from urllib.error import URLError
from urllib.request import ProxyHandler, Request, build_opener

import numpy as np

from elastickv.benchmark.stats.location import Float64
from elastickv.errors import UsageError
from elastickv.model_benchmark.gguf_file import GgufModel
from elastickv.transformers.tokenization import special_prefix, without_prefix

PACKAGE = "xllamacpp"
INSTALL = 'pip install "elastickv[gguf]"'
_LOCAL_TIMEOUT_S = 60
_ALL_LAYERS = 999
_FORCED = 1000.0


def require_bindings() -> None:
    """Check that the packages of the extra `gguf` are installed.

    Raises
    ------
    UsageError : if one is missing; names it and the command that installs it.
    """
    missing = [package for package in (PACKAGE, "gguf") if find_spec(package) is None]
    if missing:
        raise UsageError(f"{' and '.join(missing)} not installed: {INSTALL}")


def engine() -> dict[str, str]:
    """Return the name and version of the bindings, and the device that they run on."""
    used = device()
    return {"name": PACKAGE, "version": version(PACKAGE), "device": str(used["description"]), "backend": str(used["name"])}


def device() -> dict[str, Any]:
    """Return the first device that is not a CPU, else the CPU: name, description, memory_free and more."""
    bindings = import_module(PACKAGE)
    devices: list[dict[str, Any]] = bindings.get_device_info()
    cpu = bindings.ggml_backend_dev_type.GGML_BACKEND_DEVICE_TYPE_CPU
    return next((candidate for candidate in devices if candidate["type"] != cpu), devices[0])


class Llama:
    """An open model with one KV cache type for keys and values. Several may be open at once: they share the file's pages.

    Parameters
    ----------
    kv_type : one of `KV_TYPES`. All of them use flash attention: quantized values need it, and the kernel is then the same.
    tokens : capacity of the cache.
    threads : of the CPU.

    Raises
    ------
    UsageError : if llama.cpp cannot open the model.
    """

    def __init__(self, model: GgufModel, kv_type: str, tokens: int, threads: int) -> None:
        bindings = import_module(PACKAGE)
        self.kv_type, self._vocabulary = kv_type, model.vocabulary
        params = bindings.CommonParams()
        params.model.path = str(model.path)
        params.n_ctx, params.n_parallel = tokens, 1
        params.cache_type_k = params.cache_type_v = getattr(bindings.ggml_type, f"GGML_TYPE_{kv_type.upper()}")
        params.flash_attn_type = bindings.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.n_gpu_layers = _ALL_LAYERS
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        # Run exactly what is requested: no other context length, no copies of earlier prompts, no output on the terminal.
        params.fit_params, params.ctx_shift, params.cache_ram_mib, params.n_ctx_checkpoints = False, False, 0, 0
        params.verbosity = -1
        try:
            self._server = bindings.Server(params)
        except RuntimeError:
            raise UsageError(
                f"llama.cpp cannot open {model.path} with {tokens} tokens of {kv_type}: damaged, of an architecture that "
                f"{PACKAGE} {version(PACKAGE)} does not know, or too large; try a shorter `context` or another file"
            ) from None

    @cached_property
    def _letter(self) -> int:
        return self.encoded("a")[-1]

    @cached_property
    def prefix(self) -> tuple[int, ...]:
        """The special tokens that the model's file (`add_bos_token`) puts before a text."""
        return special_prefix(self._encoded)

    def encoded(self, text: str) -> list[int]:
        """Return a text's own tokens, without the special tokens before and after a text."""
        return without_prefix(self.prefix, self._encoded(text, False))

    def _encoded(self, text: str, special: bool) -> list[int]:
        # The bindings have no tokenizer, but the server that they run, on the loopback address, does.
        body = json.dumps({"content": text, "add_special": special}).encode()
        request = Request(f"{self._server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
        try:
            with build_opener(ProxyHandler({})).open(request, timeout=_LOCAL_TIMEOUT_S) as answer:
                return [int(token) for token in json.load(answer)["tokens"]]
        except (URLError, ValueError, KeyError) as error:
            raise UsageError(f"llama.cpp could not cut the text into tokens ({error}): try another model") from None

    def timed(self, prompt: list[int], steps: int) -> tuple[float, float]:
        """Return the seconds of a prompt, read into an empty cache, and of `steps` decodes after it."""
        # The prompt's own pass yields the first token.
        timings = self._complete(prompt, max_tokens=steps + 1, ignore_eos=True, cache_prompt=False)["timings"]
        if (timings["prompt_n"], timings["predicted_n"]) != (len(prompt), steps + 1):
            raise UsageError(
                f"llama.cpp read {timings['prompt_n']} of {len(prompt)} tokens and generated {timings['predicted_n']} of "
                f"{steps + 1}: the model does not generate freely; try another"
            )
        return timings["prompt_ms"] / 1e3, timings["predicted_ms"] / 1e3

    def log_probabilities(self, prompt: list[int]) -> Float64:
        """Return the (vocabulary,) log-probabilities of the next token.

        The cache holds the prefix that this prompt shares with the last call's: a prompt one token longer is one decode.
        """
        # llama.cpp reports no probabilities for a token that ends the text or is half a character. So another token is forced;
        # the reported probabilities are still the model's own.
        forced = [[self._letter, _FORCED]]
        answer = self._complete(prompt, max_tokens=1, cache_prompt=True, logprobs=self._vocabulary, logit_bias=forced)
        log_probabilities = np.full(self._vocabulary, -np.inf)
        for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            log_probabilities[entry["id"]] = entry["logprob"]
        return log_probabilities

    def _complete(self, prompt: list[int], **options: Any) -> dict[str, Any]:
        request = {"prompt": prompt, "temperature": 0, "samplers": ["top_k"], "top_k": 1} | options
        answer: dict[str, Any] = self._server.handle_completions(request)
        if "error" in answer:
            raise UsageError(f"llama.cpp refused: {answer['error'].get('message', answer['error'])}")
        return answer
