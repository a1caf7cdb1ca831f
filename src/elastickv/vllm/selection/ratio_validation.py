"""Ratios that single requests ask for, checked where vLLM checks their other parameters: a bad one is told to the client.

vLLM has no hook for parameters of a plug-in there. The scheduler checks them too, for requests that come another way.
"""

from functools import wraps
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor

from elastickv.errors import UsageError
from elastickv.vllm.selection.request_ratios import ARGUMENT, RequestRatios
from elastickv.vllm.serving_options import asks_for_pages


def validate_ratios() -> None:
    """Let the front ends of this process refuse ratios that an engine with ElasticKV does not accept; called once."""
    validate = InputProcessor._validate_params

    @wraps(validate)
    def validated(processor: Any, params: Any, *arguments: Any, **options: Any) -> Any:
        result = validate(processor, params, *arguments, **options)
        if asks_for_pages(processor.vllm_config):
            try:
                RequestRatios(processor.vllm_config.additional_config).check(params)
            except UsageError as error:
                raise VLLMValidationError(str(error), parameter=ARGUMENT) from error
        return result

    InputProcessor._validate_params = validated
