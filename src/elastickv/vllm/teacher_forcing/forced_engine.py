"""An engine of vLLM in this process that generates given tokens: teacher forcing through the decode path that serves.

Tokens of a prompt are not decoded: where decodes select pages, a prompt reads them all. So a text that is scored is generated:
the model's logits are recorded, and the sampler gets others, in which the given token is the most likely one. Both model
runners of vLLM compute logits by the model's `compute_logits`, outside of CUDA graphs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from elastickv.errors import NonFiniteError
from elastickv.vllm.model_setup import ModelSetup
from elastickv.vllm.plugin import register
from elastickv.vllm.teacher_forcing.engine_environment import engine_environment


class ForcedEngine:
    """One engine, which serves one request at a time.

    Parameters
    ----------
    arguments : of vLLM's `LLM`; it must run one request at a time, in this process, without asynchronous scheduling.

    Raises
    ------
    UsageError : if ElasticKV cannot serve the model, or with these options. What vLLM raises is passed on.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        from vllm import LLM

        register()
        self._llm = LLM(**arguments)
        self._engine, self._requests = self._llm.llm_engine, 0
        self._token: int | None = None
        self._logits: torch.Tensor | None = None
        self._llm.apply_model(self._attach)

    @property
    def environment(self) -> dict[str, Any]:
        """What runs, as `engine_environment` returns it."""
        return engine_environment(self._engine.engine_core.engine_core)

    @property
    def recipes(self) -> dict[int, str] | None:
        """The recipe of each layer that ElasticKV serves, as text, by its number; None with a stock backend."""
        setup = ModelSetup.newest()
        return None if setup is None else {layer: str(recipe) for layer, recipe in setup.served_recipes.items()}

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
        """
        from vllm import SamplingParams

        self._requests += 1
        params = SamplingParams(temperature=0, max_tokens=len(forced) + tokens, ignore_eos=True, detokenize=False)
        self._engine.add_request(str(self._requests), {"prompt_token_ids": list(prompt)}, params)
        generated, rows = list[int](), list[torch.Tensor]()
        try:
            while self._engine.has_unfinished_requests():
                self._token = forced[len(generated)] if len(generated) < len(forced) else None
                before = len(generated)
                for output in self._engine.step():
                    generated = list(output.outputs[0].token_ids)
                    if output.finished and output.outputs[0].finish_reason == "error":
                        raise NonFiniteError("vLLM ended a request: a key, a value or a logit is NaN or too large")
                self._check(generated[before:], self._token)
                if 1 <= before <= len(forced) and len(generated) > before:
                    assert self._logits is not None
                    rows.append(self._logits)
        finally:
            self._token = self._logits = None
        return torch.stack(rows), generated[len(forced) :]

    @staticmethod
    def _check(new: Sequence[int], forced: int | None) -> None:
        if len(new) > 1 or (new and forced is not None and new[0] != forced):
            raise RuntimeError(f"vLLM generated {list(new)} in a step that token {forced} was given for")

    def _attach(self, model: Any) -> None:
        """Let a model record its logits, and return such as give the sampler the token of this step."""
        compute = model.compute_logits

        def compute_logits(*arguments: Any, **options: Any) -> Any:
            logits = compute(*arguments, **options)
            if logits is None or len(logits) != 1:
                raise RuntimeError("vLLM computes logits of other tokens than one request's newest")
            self._logits = logits[0].float().cpu()
            if bool(torch.isnan(self._logits).any()):
                raise NonFiniteError("a logit is NaN: the model cannot be measured in this dtype")
            if self._token is None:
                return logits
            forced = torch.zeros_like(logits)
            forced[:, self._token] = 1
            return forced

        model.compute_logits = compute_logits
