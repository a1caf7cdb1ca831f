"""An engine of vLLM in this process that generates given tokens: teacher forcing through the decode path that serves.

Tokens of a prompt are not decoded: where decodes select pages, a prompt reads them all. So a text that is scored is generated:
the model's logits are recorded, and the sampler gets others, in which the given token is the most likely one. Both model
runners of vLLM compute logits by the model's `compute_logits`, outside of CUDA graphs. The model may be split over processes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.distributed import get_tensor_model_parallel_rank

from elastickv.errors import NonFiniteError, UsageError
from elastickv.vllm.model_setup import ModelSetup
from elastickv.vllm.plugin import register
from elastickv.vllm.teacher_forcing.engine_environment import engine_environment

_EXIT_WAIT_S = 2.0  # for the exit of a process that an error may come from


class ForcedEngine:
    """One engine, which serves one request at a time.

    Parameters
    ----------
    arguments : of vLLM's `LLM`; it must schedule one request at a time, in this process, without asynchronous scheduling.

    Raises
    ------
    UsageError : if ElasticKV cannot serve the model, or with these options. What vLLM raises is passed on.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        from vllm import LLM

        register()
        self._llm = LLM(**arguments)
        self._engine, self._requests = self._llm.llm_engine, 0
        self._llm.apply_model(force_tokens)

    @property
    def environment(self) -> dict[str, Any]:
        """What runs, as `engine_environment` returns it."""
        return engine_environment(self._engine.engine_core.engine_core)

    @property
    def recipes(self) -> dict[int, str] | None:
        """The recipe of each layer that ElasticKV serves, as text, by its number; None with a stock backend."""
        recipes: dict[int, str] | None = self._llm.apply_model(served_recipes)[0]
        return recipes

    def decode(self, prompt: Sequence[int], forced: Sequence[int], tokens: int) -> tuple[torch.Tensor, list[int]]:
        """Generate given tokens after a prompt, then others greedily.

        Parameters
        ----------
        forced : tokens that are generated, at least one.
        tokens : how many follow them, at least one.

        Returns
        -------
        logits : (len(forced), vocabulary) float32 on the CPU, after each of the given tokens.
        generated : the tokens that follow.

        Raises
        ------
        NonFiniteError : if a logit is NaN.
        UsageError : naming the processes of the model that ended, if any did.
        """
        with self._naming_lost_workers():
            return self._decoded(prompt, forced, tokens)

    def _decoded(self, prompt: Sequence[int], forced: Sequence[int], tokens: int) -> tuple[torch.Tensor, list[int]]:
        from vllm import SamplingParams

        self._requests += 1
        params = SamplingParams(temperature=0, max_tokens=len(forced) + tokens, ignore_eos=True, detokenize=False)
        self._engine.add_request(str(self._requests), {"prompt_token_ids": list(prompt)}, params)
        generated, rows = list[int](), list[NDArray[np.float32]]()
        while self._engine.has_unfinished_requests():
            token = forced[len(generated)] if len(generated) < len(forced) else None
            before = len(generated)
            self._llm.apply_model(partial(set_token, token=token))
            for output in self._engine.step():
                generated = list(output.outputs[0].token_ids)
                if output.finished and output.outputs[0].finish_reason == "error":
                    raise NonFiniteError("vLLM ended a request: a key, a value or a logit is NaN or too large")
            self._check(generated[before:], token)
            if 1 <= before <= len(forced) and len(generated) > before:
                rows.append(self._newest_logits())
        return torch.from_numpy(np.stack(rows)), generated[len(forced) :]

    @contextmanager
    def _naming_lost_workers(self) -> Iterator[None]:
        """Replace an error by one that names the processes of the model that ended, if any did."""
        try:
            yield
        except (UsageError, NonFiniteError):
            raise
        except Exception as error:
            executor = self._engine.engine_core.engine_core.model_executor
            processes = [handle.proc for handle in getattr(executor, "workers", None) or []]  # none: this one runs the model
            if processes:
                wait([process.sentinel for process in processes], _EXIT_WAIT_S)
            lost = [f"{process.name} (exit code {process.exitcode})" for process in processes if process.exitcode]
            if not lost:
                raise
            raise UsageError(
                f"a process in which vLLM runs a part of the model ended: {', '.join(lost)}; for vLLM's log, set "
                "ELASTICKV_ENGINE_LOG to a file and run the command again"
            ) from error

    def _newest_logits(self) -> NDArray[np.float32]:
        """Return the (vocabulary,) logits of the last step.

        Raises
        ------
        NonFiniteError : if one is NaN.
        """
        logits: NDArray[np.float32] = next(each for each in self._llm.apply_model(newest_logits) if each is not None)
        if np.isnan(logits).any():
            raise NonFiniteError("a logit is NaN: the model cannot be measured in this dtype, give another `dtype`")
        return logits

    @staticmethod
    def _check(new: Sequence[int], forced: int | None) -> None:
        if len(new) > 1 or (new and forced is not None and new[0] != forced):
            raise RuntimeError(f"vLLM generated {list(new)} in a step that token {forced} was given for")


# What follows runs in each process that has a part of the model; `apply_model` gives these functions that part.


class ForcedLogits:
    """A model's `compute_logits` that records its result, and returns logits that give the sampler the token of this step.

    Attributes
    ----------
    token : of this step; None: the sampler gets the model's logits.
    newest : (vocabulary,) float32 logits of the last step, on the CPU; None on all ranks but the first.
    """

    def __init__(self, compute: Any) -> None:
        self._compute = compute
        self.token: int | None = None
        self.newest: torch.Tensor | None = None

    def __call__(self, *arguments: Any, **options: Any) -> torch.Tensor | None:
        """Return logits as the model does.

        Raises
        ------
        RuntimeError : if they are of other tokens than one request's newest.
        """
        logits: torch.Tensor | None = self._compute(*arguments, **options)
        if logits is None:  # the first rank has them all
            return None
        if len(logits) != 1:
            raise RuntimeError("vLLM computes logits of other tokens than one request's newest")
        if get_tensor_model_parallel_rank() == 0:
            self.newest = logits[0].float().cpu()
        if self.token is None:
            return logits
        forced = torch.zeros_like(logits)
        forced[:, self.token] = 1
        return forced


def force_tokens(model: Any) -> None:
    """Give a model `ForcedLogits`."""
    model.compute_logits = ForcedLogits(model.compute_logits)


def set_token(model: Any, token: int | None) -> None:
    """Set the token of the next step."""
    model.compute_logits.token = token


def newest_logits(model: Any) -> NDArray[np.float32] | None:
    """Return `ForcedLogits.newest` as an array."""
    logits: torch.Tensor | None = model.compute_logits.newest
    return None if logits is None else logits.numpy()


def served_recipes(model: Any) -> dict[int, str] | None:
    """Return the recipe of each layer that ElasticKV serves, of all KV heads, as text, by its number; None: a stock backend."""
    setup = ModelSetup.newest()
    return None if setup is None else {layer: str(recipe) for layer, recipe in setup.served_recipes.items()}
