"""Compiles the kernels that a cache needs before it is made, with a bar, and some of them in processes of their own.

Numba compiles one function at a time in a process. `python -m elastickv.backends.cpu.compilation NAME...` is such a process: it
leaves the compiled code on disk, from where this one loads it.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from time import sleep

from elastickv.backends.cpu import decode, page, selection, steps, storage, threads
from elastickv.backends.cpu.numba_cache import Kernel, cache_kernels_on_disk, compiled_folder
from elastickv.backends.cpu.quantizers.gptq_pages import quantizers
from elastickv.backends.protocol import Reporter
from elastickv.recipe import Recipe

# About the seconds that a kernel takes on one core, for shares of equal length and a bar that moves evenly.
SECONDS = {
    "page.attend_page": 3.5,
    "blocks.block_decode.decode_rows": 3.6,
    "blocks.block_dequantize.dequantize_slab": 0.9,
    "blocks.block_gather.gather_tokens": 0.4,
    "blocks.block_store.store_step": 0.8,
    "decode.decode_item": 2.1,
    "quantizers.nearest_pages.quantize_keys_int4": 0.7,
    "storage.append_token": 0.5,
    "selection.score_item": 0.5,
    "quantizers.nearest_pages.quantize_values_int4": 0.4,
    "quantizers.nearest_pages.quantize_keys_int3": 0.3,
    "quantizers.nearest_pages.quantize_values_int3": 0.3,
    "quantizers.nearest_pages.quantize_keys_int2": 0.3,
    "quantizers.nearest_pages.quantize_values_int2": 0.3,
    "quantizers.nearest_pages.store_rows": 0.4,
    "quantizers.gptq_pages.quantize_keys_gptq": 0.5,
    "quantizers.gptq_pages.quantize_values_gptq": 0.7,
}
OTHER_SECONDS = 0.2
START_SECONDS = 1.2  # of a process, to import Numba
MOST_PROCESSES = 3  # more would wait for the largest kernel
POLL_S = 0.1
_PACKAGE = "elastickv.backends.cpu"


def needed_kernels(recipe: Recipe, dtype: str) -> list[Kernel]:
    """Return the kernels that a cache of a recipe is made with."""
    kernels = [page.attend_page, decode.decode_item, storage.append_token, steps.attend, steps.store_block]
    if not recipe.is_dense:
        kernels += dict.fromkeys(quantizers(recipe, dtype))
    if recipe.selection == "pages":
        kernels.append(selection.score_item)
    return kernels


def compile_kernels(kernels: Sequence[Kernel], report: Reporter | None, processes: int | None = None) -> None:
    """Compile those of `kernels` whose code is not on disk, in up to `processes` processes; by default one for each thread.

    Raises
    ------
    CompileFailure : if one of them does not compile.
    """
    missing = [kernel for kernel in kernels if not kernel.is_compiled()]
    if not missing:
        return
    most = threads.count() if processes is None else processes
    own, *others = shares(missing, min(most, MOST_PROCESSES) if _runs_modules() else 1)
    if report is not None:
        report.phase("compiling CPU kernels, once on this machine")
    total = sum(map(_tenths, missing))
    with _processes(others) as running:
        for kernel in own:
            _show(report, missing, total)
            kernel.address  # noqa: B018
        while any(process.poll() is None for process in running):
            _show(report, missing, total)
            sleep(POLL_S)
    for kernel in missing:
        kernel.address  # noqa: B018
    _show(report, missing, total)


def shares(kernels: Sequence[Kernel], processes: int) -> list[list[Kernel]]:
    """Divide kernels between this process, the first, and others where they save time: the slowest ones first."""
    loads = [0.0] + [START_SECONDS] * (processes - 1)
    parts: list[list[Kernel]] = [[] for _ in loads]
    for kernel in sorted(kernels, key=_seconds, reverse=True):
        least = min(range(len(loads)), key=loads.__getitem__)
        parts[least].append(kernel)
        loads[least] += _seconds(kernel)
    return [parts[0], *filter(None, parts[1:])]


def _runs_modules() -> bool:
    """Return whether `sys.executable` is Python: a program that embeds Python names itself there."""
    return bool(sys.executable) and Path(sys.executable).stem.lower().startswith(("python", "pypy"))


def _seconds(kernel: Kernel) -> float:
    return SECONDS.get(kernel.name, OTHER_SECONDS)


def _tenths(kernel: Kernel) -> int:
    return round(10 * _seconds(kernel))


def _show(report: Reporter | None, kernels: Sequence[Kernel], total: int) -> None:
    if report is not None:
        report.progress(sum(_tenths(kernel) for kernel in kernels if kernel.is_compiled()), total)


@contextmanager
def _processes(parts: Sequence[Sequence[Kernel]]) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Start a process for each part. One that fails leaves its part to this process."""
    paths = [str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"NUMBA_CACHE_DIR": str(compiled_folder()), "PYTHONPATH": os.pathsep.join(paths)}
    with ExitStack() as stack:
        running = []
        for part in parts:
            command = [sys.executable, "-m", f"{_PACKAGE}.compilation", *(kernel.name for kernel in part)]
            try:
                process = subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
            except OSError:  # no interpreter, as in a frozen program
                break
            stack.callback(_end, process)
            running.append(process)
        yield running


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.kill()
    process.wait()


def main(names: Sequence[str]) -> None:
    """Compile the kernels of these names, MODULE.FUNCTION."""
    with cache_kernels_on_disk():
        for name in names:
            module, _, function = name.rpartition(".")
            kernel: Kernel = getattr(import_module(f"{_PACKAGE}.{module}"), function)
            kernel.address  # noqa: B018


if __name__ == "__main__":
    main(sys.argv[1:])
