"""The entry point that vLLM calls in each of its processes."""

import copyreg
import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from elastickv.errors import UsageError
from elastickv.vllm.layer_formats import read_calibration, with_calibration_hash
from elastickv.vllm.serving_options import (
    CACHE_DTYPES,
    FORMAT_NAMES,
    KEY,
    PAGE_FORMATS,
    ServingOptions,
    recipe_of,
)
from elastickv.vllm.versions import installed_version, is_for_cpus, minor_version, unsupported_reason

_log = logging.getLogger("vllm.elastickv")
_OPTIONS = "additional-config"
_ABOUT_ATTENTION = re.compile(r"-+(?:attention-|ac(?:[.=]|$))")
_BACKEND = "ELASTICKV"
_registered = False


def register() -> None:
    """Register the attention backend, its KV cache dtypes, the window's specification and metrics; once a process.

    With a version of vLLM that is not supported it logs one line and changes nothing.

    Raises
    ------
    SystemExit : with one line, if the process's command line has options of ElasticKV that are not accepted.
    """
    global _registered
    if _registered:
        return
    _registered = True
    installed = installed_version()
    if installed is None:
        return
    reason = unsupported_reason(installed.version, installed.package)
    if reason is not None:
        _log.warning("ElasticKV is not available: %s", reason)
        return
    offered = minor_version(installed.version)
    assert offered is not None, "it is supported"
    on_cpu = is_for_cpus(installed.version, installed.package)
    refused = refusal(sys.argv[1:], on_cpu, offered.named_cache_dtypes)
    if refused is not None:
        raise SystemExit(f"ElasticKV: {refused}")
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from elastickv.vllm import cpu_backend
    from elastickv.vllm.metrics.read_metrics import register_metrics
    from elastickv.vllm.selection.ratio_validation import validate_ratios
    from elastickv.vllm.window_manager import register_specs

    register_specs()
    register_metrics()
    validate_ratios()
    register_backend(_BACKEND, "elastickv.vllm.attention_backend.ElasticAttentionBackend")
    copyreg.pickle(AttentionBackendEnum, _reduced)
    if current_platform.is_cpu():
        for name in cpu_backend.NAMES:
            if (stock := getattr(AttentionBackendEnum, name, None)) is not None:
                register_backend(stock, cpu_backend.path_of(name))
    if offered.named_cache_dtypes:
        from elastickv.vllm.cache_dtypes import register_cache_dtypes

        register_cache_dtypes()


def _reduced(backend: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return how to pickle one of vLLM's backends: ElasticKV's by its name, and others by their values, as enumerations are.

    A spawned process of vLLM unpickles its configuration before it loads plug-ins, and has no such value until then.
    """
    return (registered_backend, ()) if backend.name == _BACKEND else (type(backend), (backend.value,))


def registered_backend() -> Any:
    """Register what `register` does, and return vLLM's member for the attention backend."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register()
    return AttentionBackendEnum[_BACKEND]


def refusal(arguments: Sequence[str], on_cpu: bool = False, named_cache_dtypes: bool = True) -> str | None:
    """Return why the options of a command line are not accepted, or None; also where they are not there to be read.

    vLLM gives a plug-in no configuration in the process that the user starts, but loads it there: what its arguments say is
    known by then. Options of `LLM(...)`, and those in a file of `--config`, are checked by the engine.

    Parameters
    ----------
    arguments : of the process, without its name.
    on_cpu : whether vLLM serves on CPUs, where the options alone ask for ElasticKV, and not the name of its backend.
    named_cache_dtypes : whether vLLM knows KV cache dtypes of ElasticKV.
    """
    try:
        additional: Any = json.loads(_value(arguments, _OPTIONS) or "null")
    except ValueError:
        return None  # vLLM says it
    if any(_is_option(argument.partition(".")[0], _OPTIONS) for argument in arguments if "." in argument):
        additional = _by_parts(arguments)
    dtype = _value(arguments, "kv-cache-dtype")
    ours = isinstance(additional, Mapping) and KEY in additional
    try:
        if ours:
            read_calibration(ServingOptions.parse(with_calibration_hash(additional)) or ServingOptions())
        # A file may say another dtype.
        if dtype in CACHE_DTYPES or (ours and _value(arguments, "config") is None):
            recipe_of(ServingOptions.parse(additional), dtype or "auto")
    except UsageError as error:
        return str(error)
    if dtype in CACHE_DTYPES and not named_cache_dtypes:
        options = json.dumps({KEY: {"format": FORMAT_NAMES[dtype]} | dict(additional[KEY] if ours else {})})
        return f"`kv_cache_dtype={dtype}` has a name from vLLM 0.33 on: leave it out and give `additional_config={options}`"
    if _value(arguments, "config") is not None:
        return None
    named = any("elastickv" in argument.lower() for argument in _of_attention(arguments))
    if on_cpu and named and not ours:
        options = json.dumps({KEY: {"format": next(iter(PAGE_FORMATS))}})
        return f"`attention_backend=ELASTICKV` is for GPUs, and this is a CPU: give `additional_config={options}` instead"
    if not on_cpu and not named and (ours or dtype in CACHE_DTYPES):
        what = f"`additional_config` has options of `{KEY}`" if ours else f"`kv_cache_dtype={dtype}` is ElasticKV's"
        return f"{what}, and nothing asks for its backend: add `attention_backend=ELASTICKV`"
    return None


def _of_attention(arguments: Sequence[str]) -> list[str]:
    """Return the options about attention backends, with what follows them."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    return [f"{one} {other}" for one, other in pairs if _ABOUT_ATTENTION.match(one.replace("_", "-"))]


def _value(arguments: Sequence[str], name: str) -> str | None:
    """Return the last value of an option, given after a space or an equals sign, with `-` or `_` between words."""
    passed = None
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        option, equals, value = argument.partition("=")
        if _is_option(option, name):
            passed = value if equals else following
    return passed


def _by_parts(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the option where it is given as `--additional-config.elastickv.window 256`: it replaces JSON, as in vLLM."""
    whole: dict[str, Any] = {}
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, equals, text = argument.partition("=")
        name, *path = option.split(".")
        if not _is_option(name, _OPTIONS) or not path:
            continue
        text = text if equals else following
        try:
            value = json.loads(text)
        except ValueError:
            if text[:1].isdigit() or option.endswith("+"):  # 1k is a number to vLLM, and a plus makes lists
                return {}
            value = text
        *outer, last = path
        inner = whole
        for each in outer:
            nested = inner.setdefault(each, {})
            if not isinstance(nested, dict):
                return {}  # vLLM says it
            inner = nested
        inner[last] = value
    return whole


def _is_option(argument: str, name: str) -> bool:
    return argument.startswith("--") and argument[2:].replace("_", "-") == name
