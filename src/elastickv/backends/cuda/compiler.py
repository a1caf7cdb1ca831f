"""Compiles CUDA C++ to cubins with NVRTC, for any architecture and without a driver; caches them on disk."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from elastickv.backends.cuda.format_macros import format_macros
from elastickv.backends.cuda.wheels import cuda_install_command
from elastickv.backends.kernel_cache import cache_folder, load_compiled, save_compiled
from elastickv.errors import CompileFailure, UsageError

KERNELS = Path(__file__).parent / "kernels"
ARCHITECTURES = ("61", "70", "75", "80", "86", "89", "90", "100", "120")
_CACHES = (12, 9)  # the first NVRTC with a cache of its own
_LOG_LINES = 6


@dataclass(frozen=True)
class Resources:
    """What ptxas reports of one kernel: registers per thread, spilled bytes, static shared bytes."""

    kernel: str
    registers: int
    spill_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Compiled:
    """A cubin and the resources of its kernels."""

    cubin: bytes
    resources: tuple[Resources, ...]


def nvrtc() -> Any:
    """Return `cuda.bindings.nvrtc` with its library loaded.

    Raises
    ------
    UsageError : if it is not installed; the message says what to install.
    """
    try:
        from cuda.bindings import nvrtc as module

        module.nvrtcVersion()
    except Exception as error:  # the loader raises its own types
        raise UsageError(f"NVRTC, the CUDA run-time compiler, cannot be loaded: {cuda_install_command()}") from error
    return module


def nvrtc_version() -> tuple[int, int]:
    """Return NVRTC's version."""
    _, major, minor = nvrtc().nvrtcVersion()
    return major, minor


@cache
def supported_architectures() -> tuple[int, ...]:
    """Return the compute capabilities (61, 90, ...) that this NVRTC compiles for."""
    _, architectures = nvrtc().nvrtcGetSupportedArchs()
    return tuple(architectures)


@cache
def include_directory() -> str:
    """Return the folder of cuda_fp16.h.

    Raises
    ------
    UsageError : if the headers are not installed.
    """
    try:
        from cuda.pathfinder import find_nvidia_header_directory

        headers = find_nvidia_header_directory("cudart")
    except Exception:  # a missing or old pathfinder
        headers = None
    if not headers or not (Path(headers) / "cuda_fp16.h").is_file():
        raise UsageError(f"the CUDA headers (cuda_fp16.h) are not found: {cuda_install_command()}")
    return str(headers)


@cache
def _headers_digest() -> str:
    digest = hashlib.sha256()
    for path in (*sorted(KERNELS.glob("*.cuh")), *sorted(Path(include_directory()).glob("cuda_[bf]*[168].h*"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def compile_source(name: str, arch: str, macros: Mapping[str, int]) -> Compiled:
    """Compile `kernels/<name>.cu` for compute capability `arch` ('90') with `macros`, or take it from the disk cache.

    Raises
    ------
    CompileFailure : if it does not compile.
    """
    source = (KERNELS / f"{name}.cu").read_bytes()
    options = _options(arch, macros)
    key = hashlib.sha256(
        json.dumps([name, options[:-1], nvrtc_version(), _headers_digest(), hashlib.sha256(source).hexdigest()]).encode()
    ).hexdigest()
    path = cache_folder("kernels") / f"{key}.kernel"
    compiled = _read(path)
    if compiled is None:
        compiled = _compile(name, arch, source, options)
        save_compiled(path, json.dumps([asdict(r) for r in compiled.resources]).encode() + b"\n" + compiled.cubin)
    return compiled


def compile_file(path: Path, arch: str, macros: Mapping[str, int]) -> Compiled:
    """Compile a CUDA source file as `compile_source` does a kernel, with the same headers but without the disk cache.

    Raises
    ------
    CompileFailure : if it does not compile.
    """
    return _compile(path.stem, arch, path.read_bytes(), _options(arch, macros))


def _options(arch: str, macros: Mapping[str, int]) -> list[str]:
    return [
        f"--gpu-architecture=sm_{arch}",
        "--std=c++17",
        "--ptxas-options=-v",
        # With a driver NVRTC has a cache of its own, whose results lack ptxas's report.
        *(["--no-cache"] if nvrtc_version() >= _CACHES else []),
        f"--include-path={KERNELS}",
        *(f"-D{name}={value}" for name, value in sorted(format_macros(macros).items())),  # error messages leave these out
        *(f"--define-macro={name}={value}" for name, value in sorted(macros.items())),
        f"--include-path={include_directory()}",
    ]


def _compile(name: str, arch: str, source: bytes, options: list[str]) -> Compiled:
    module = nvrtc()
    status, program = module.nvrtcCreateProgram(source, f"{name}.cu".encode(), 0, [], [])
    if int(status):
        raise CompileFailure(_failure_message(name, arch, options, f"NVRTC cannot create a program: {status}"))
    try:
        (status,) = module.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        _, size = module.nvrtcGetProgramLogSize(program)
        # The binding writes into these: fresh objects, never a shared one such as b" ".
        log = bytes(size + 1)
        module.nvrtcGetProgramLog(program, log)
        if int(status):
            raise CompileFailure(
                _failure_message(name, arch, options, log.rstrip(b"\0").decode(errors="replace") or str(status))
            )
        _, size = module.nvrtcGetCUBINSize(program)
        cubin = bytes(size)
        module.nvrtcGetCUBIN(program, cubin)
    finally:
        module.nvrtcDestroyProgram(program)
    return Compiled(cubin, _resources(log.rstrip(b"\0").decode(errors="replace")))


def _failure_message(name: str, arch: str, options: list[str], log: str) -> str:
    """Return the message that names kernel and architecture, with the first lines of the compiler's log."""
    first = [line.strip() for line in log.splitlines() if line.strip()][:_LOG_LINES]
    macros = " ".join(option.partition("=")[2] for option in options if option.startswith("--define-macro"))
    built = f"{name}.cu ({macros})" if macros else f"{name}.cu"
    version = ".".join(map(str, nvrtc_version()))
    remedy = f"{cuda_install_command()} again, or report it"
    return f"{built} does not compile for sm_{arch} with NVRTC {version}: {' | '.join(first)}; {remedy}"


def _resources(log: str) -> tuple[Resources, ...]:
    resources = []
    for part in re.split(r"Compiling entry function '", log)[1:]:
        registers, spilled = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes spill stores", part)
        shared = re.search(r"(\d+)(?:\+\d+)? bytes smem", part)
        if not registers or not spilled:
            raise CompileFailure(f"ptxas's resource report is not understood: {part[:300]}")
        resources.append(Resources(part.partition("'")[0], int(registers[1]), int(spilled[1]), int(shared[1]) if shared else 0))
    return tuple(resources)


def _read(path: Path) -> Compiled | None:
    """Return a cached kernel; None if it is absent, damaged or in another format."""
    body = load_compiled(path)
    if body is None:
        return None
    header, _, cubin = body.partition(b"\n")
    try:
        return Compiled(cubin, tuple(Resources(**r) for r in json.loads(header)))
    except (ValueError, TypeError, RecursionError):
        return None
