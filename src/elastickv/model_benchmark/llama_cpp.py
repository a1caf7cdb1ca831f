"""llama.cpp through the prebuilt bindings `xllamacpp`, which are imported when a model is opened and nowhere else."""

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

PACKAGE = "xllamacpp"
INSTALL = 'pip install "elastickv[gguf]"'
_LOCAL_TIMEOUT_S = 60
_ALL_LAYERS = 999
_FORCED = 1000.0


def require_bindings() -> None:
    """Refuse to go on without the packages of the extra `gguf`.

    Raises
    ------
    UsageError : naming what is missing and the command that installs it.
    """
    missing = [package for package in (PACKAGE, "gguf") if find_spec(package) is None]
    if missing:
        raise UsageError(f"{' and '.join(missing)} not installed: {INSTALL}")


def engine() -> dict[str, str]:
    """Return what llama.cpp is and where it runs: name, version and device, the GPU's where the bindings were built for one."""
    found = device()
    return {"name": PACKAGE, "version": version(PACKAGE), "device": str(found["description"]), "backend": str(found["name"])}


def device() -> dict[str, Any]:
    """Return the first device that is no CPU, or the CPU: name, description, memory_free and more."""
    bindings = import_module(PACKAGE)
    devices: list[dict[str, Any]] = bindings.get_device_info()
    cpu = bindings.ggml_backend_dev_type.GGML_BACKEND_DEVICE_TYPE_CPU
    return next((found for found in devices if found["type"] != cpu), devices[0])


class Llama:
    """A model held open with one KV cache type for keys and values. Several may be open at once: the file's pages are shared.

    Parameters
    ----------
    kv_type : one of `KV_TYPES`. Flash attention is on for all of them: quantised values need it, and one kernel serves all.
    tokens : places in the cache.
    threads : of the CPU.

    Raises
    ------
    UsageError : if llama.cpp cannot open the model.
    """

    def __init__(self, model: GgufModel, kv_type: str, tokens: int, threads: int) -> None:
        bindings = import_module(PACKAGE)
        self.kv_type, self._vocabulary = kv_type, model.vocabulary
        wanted = bindings.CommonParams()
        wanted.model.path = str(model.path)
        wanted.n_ctx, wanted.n_parallel = tokens, 1
        wanted.cache_type_k = wanted.cache_type_v = getattr(bindings.ggml_type, f"GGML_TYPE_{kv_type.upper()}")
        wanted.flash_attn_type = bindings.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
        wanted.n_gpu_layers = _ALL_LAYERS
        wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = threads
        # What is asked for is what runs: no other context, no copies of earlier prompts, no lines on the terminal.
        wanted.fit_params, wanted.ctx_shift, wanted.cache_ram_mib, wanted.n_ctx_checkpoints = False, False, 0, 0
        wanted.verbosity = -1
        try:
            self._server = bindings.Server(wanted)
        except RuntimeError:
            raise UsageError(
                f"llama.cpp cannot open {model.path} with {tokens} tokens of {kv_type}: damaged, of an architecture that "
                f"{PACKAGE} {version(PACKAGE)} does not know, or too large; try a shorter `context` or another file"
            ) from None

    @cached_property
    def _letter(self) -> int:
        return self.encoded("a")[-1]

    def encoded(self, text: str) -> list[int]:
        """Return a text's tokens, with those that the model wants at its beginning."""
        # The bindings wrap no tokeniser: the server that they run, on this machine alone, has one.
        body = json.dumps({"content": text, "add_special": True}).encode()
        request = Request(f"{self._server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
        try:
            with build_opener(ProxyHandler({})).open(request, timeout=_LOCAL_TIMEOUT_S) as answer:
                return [int(token) for token in json.load(answer)["tokens"]]
        except (URLError, ValueError, KeyError) as error:
            raise UsageError(f"llama.cpp could not cut the text into tokens ({error}): try another model") from None

    def timed(self, prompt: list[int], steps: int) -> tuple[float, float]:
        """Return the seconds of the prompt, read into an empty cache, and those of `steps` decodes after it."""
        # The first token comes out of the prompt's own pass.
        said = self._complete(prompt, max_tokens=steps + 1, ignore_eos=True, cache_prompt=False)
        took = said["timings"]
        if (took["prompt_n"], took["predicted_n"]) != (len(prompt), steps + 1):
            raise UsageError(
                f"llama.cpp read {took['prompt_n']} of {len(prompt)} tokens and made {took['predicted_n']} of {steps + 1}: "
                "the model does not generate freely; try another"
            )
        return took["prompt_ms"] / 1e3, took["predicted_ms"] / 1e3

    def log_probabilities(self, prompt: list[int]) -> Float64:
        """Return the (vocabulary,) log-probabilities of the next token.

        What the last call's prompt has in common with this one is in the cache: a prompt one token longer is one decode.
        """
        # Nothing is told of a token that ends the text or half a character: one that is neither is forced. What is told are
        # the model's own probabilities all the same.
        forced = [[self._letter, _FORCED]]
        said = self._complete(prompt, max_tokens=1, cache_prompt=True, logprobs=self._vocabulary, logit_bias=forced)
        found = np.full(self._vocabulary, -np.inf)
        for entry in said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found

    def _complete(self, prompt: list[int], **options: Any) -> dict[str, Any]:
        asked = {"prompt": prompt, "temperature": 0, "samplers": ["top_k"], "top_k": 1} | options
        said: dict[str, Any] = self._server.handle_completions(asked)
        if "error" in said:
            raise UsageError(f"llama.cpp refused: {said['error'].get('message', said['error'])}")
        return said
