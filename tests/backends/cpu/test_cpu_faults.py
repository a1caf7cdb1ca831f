"""The CPU backend under faults: its cache of kernels, forks, threads, want of memory, kernels that do not compile."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

import elastickv
from elastickv.backends.cpu import compilation, decode, numba_cache, page, steps, storage, threads
from elastickv.backends.kernel_cache import load_compiled
from elastickv.errors import CompileFailure
from elastickv.recipe import AttentionShape, Recipe
from tests.helpers.full_disk import fill, small_disk

SCRIPT = str(Path(__file__).with_name("cached_kernels.py"))
SHAPE = AttentionShape(1, 8, 8, 64)
TOKENS = 400  # enough for all threads


def started(folder, *arguments):
    environment = os.environ | {"PYTHONPATH": str(Path(elastickv.__file__).parents[1]), "ELASTICKV_CACHE_DIR": str(folder)}
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.strip(), err


@pytest.mark.fault("damaged kernel cache")
def test_a_compiled_kernel_is_loaded_and_a_damaged_one_is_compiled_again_and_replaced(tmp_path):
    assert ended(started(tmp_path)) == ("22.5", "")
    (file,) = tmp_path.rglob("*.kernel")
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]):
        file.write_bytes(damaged)
        assert ended(started(tmp_path)) == ("22.5", "")
        assert load_compiled(file) is not None
    assert ended(started(tmp_path, "compiled")) == ("22.5", "")
    assert list(tmp_path.rglob("*.kernel")) == [file]


@pytest.mark.fault("two processes compile at once")
def test_four_processes_compile_into_one_empty_folder(tmp_path):
    processes = [started(tmp_path / "new") for _ in range(4)]
    assert [ended(process) for process in processes] == [("22.5", "")] * 4
    (file,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert load_compiled(file) is not None


@pytest.mark.fault("read-only kernel cache")
def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    out, err = ended(started(tmp_path / "file" / "kernels"))
    assert out == "22.5" and err.count("compiled kernels cannot be kept") == 1


@pytest.mark.fault("full kernel cache")
def test_a_full_folder_costs_one_warning(tmp_path):
    with small_disk(tmp_path / "disk", 128) as disk:
        if disk is None:
            pytest.skip("no file system may be mounted here")
        fill(disk)
        out, err = ended(started(disk))
        assert out == "22.5" and err.count("No space left on device") == 1
        assert [path.name for path in disk.rglob("*") if path.is_file()] == ["filler"]


@pytest.mark.fault("a kernel that does not compile")
def test_a_kernel_that_does_not_compile_is_named_with_the_first_lines_of_the_log(tmp_path, monkeypatch):
    source = tmp_path / "broken.py"
    source.write_text(
        "from numba import njit\n\n@njit('int64(int64)', cache=True)\ndef widen(value):\n    return value + 'a'\n"
    )
    monkeypatch.setattr(numba_cache, "_FOLDER", tmp_path)
    monkeypatch.setenv("ELASTICKV_CACHE_DIR", str(tmp_path / "kernels"))
    said = r"broken\.py:widen does not compile with Numba .* for .*add\(int64, Literal\[str\]\(a\)\)"
    with pytest.raises(CompileFailure, match=said) as error, numba_cache.cache_kernels_on_disk():
        exec(compile(source.read_text(), source, "exec"), {"__name__": "broken"})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("NUMBA_NUM_THREADS", "many", "could not be parsed"),
        ("NUMBA_NUM_THREADS", "0", "must be > 0"),
        ("NUMBA_NUM_THREADS", "99999", "at most 1024"),
        ("NUMBA_THREADING_LAYER", "no layer", "unknown to Numba"),
        ("NUMBA_DISABLE_JIT", "1", "nothing is compiled"),
    ],
)
def test_an_environment_that_numba_cannot_run_in_is_refused_in_one_line(name, value, said):
    code = "from elastickv.backends import load; from elastickv.errors import UsageError\n"
    code += "try:\n    load()\nexcept UsageError as error:\n    print(error)"
    environment = os.environ | {"PYTHONPATH": str(Path(elastickv.__file__).parents[1]), name: value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""
    assert f"cannot start with {name}={value}: " in done.stdout and said in done.stdout and done.stdout.count("\n") == 1


def made(backend, seed=1):
    cache = backend.cache(SHAPE, TOKENS + 8, "bf16", Recipe.parse("int8"))
    cache.fill_random(np.array([TOKENS]), seed)
    return cache


def queries(seed=0):
    return np.random.default_rng(seed).standard_normal((1, 8, 64), dtype=np.float32)


def _in_child(work, patience_s=60):
    """Run `work` in a forked process; it must end by itself, with True."""
    child = os.fork()
    if not child:
        signal.alarm(patience_s)  # Ends a child that waits for ever.
        os._exit(0 if work() else 1)
    return os.waitpid(child, 0)[1]


@pytest.mark.fault("fork")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_decodes_what_its_parent_does(backend):
    cache = made(backend)
    assert cache.threads_worth(TOKENS) == threads.count()
    expected = cache.decode(queries())[0]

    def same():
        own = made(backend)
        return np.array_equal(cache.decode(queries())[0], expected) and np.array_equal(own.decode(queries())[0], expected)

    assert _in_child(same) == 0
    assert np.array_equal(cache.decode(queries())[0], expected)


@pytest.mark.fault("fork")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_in_the_middle_of_another_threads_decode_does_not_wait_for_it(backend):
    cache = made(backend)
    expected = cache.decode(queries())[0]
    with threads._LOCK:  # as another thread would hold it
        assert _in_child(lambda: np.array_equal(cache.decode(queries())[0], expected)) == 0


def _decoded(seed):
    from elastickv.backends.cpu import open_backend

    return made(open_backend(None), seed).decode(queries(seed))[0]


@pytest.mark.fault("fork")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_pool_of_forked_processes_decodes(backend):
    made(backend).decode(queries())
    with get_context("fork").Pool(2) as pool:
        outputs = pool.map_async(_decoded, range(4)).get(timeout=120)
    for seed, output in enumerate(outputs):
        assert np.array_equal(output, made(backend, seed).decode(queries(seed))[0])


@pytest.mark.fault("threads")
def test_threads_decode_at_once_each_with_its_own_cache(backend):
    alone = [made(backend, seed) for seed in range(4)]
    expected = [[cache.decode(queries(step))[0] for step in range(50)] for cache in alone]
    caches, begin = [made(backend, seed) for seed in range(4)], threading.Barrier(4)

    def decode(cache):
        begin.wait()
        return [cache.decode(queries(step))[0] for step in range(50)]

    with ThreadPoolExecutor(4) as pool:
        assert np.array_equal(list(pool.map(decode, caches)), expected)


@pytest.mark.fault("threads")
@pytest.mark.parametrize("method", ["decode", "append", "prefill", "extend", "fill_random"])
def test_a_second_thread_inside_a_cache_is_refused_and_changes_nothing(backend, method):
    cache = made(backend)
    rows = np.zeros((1, 8, 1, 64), np.float32)
    arguments = {
        "decode": (queries(),),
        "append": (rows[:, :, 0], rows[:, :, 0]),
        "prefill": (rows, rows, np.array([1])),
        "extend": (rows, rows, np.array([1])),
        "fill_random": (np.array([3]), 0),
    }
    expected = cache.decode(queries())[0]
    with cache._own, pytest.raises(RuntimeError, match="two threads use one cache at once"):
        getattr(cache, method)(*arguments[method])
    assert cache.lengths.tolist() == [TOKENS]
    assert np.array_equal(cache.decode(queries())[0], expected)


@pytest.mark.fault("threads")
def test_two_threads_that_hammer_one_cache_get_right_results_or_a_refusal(backend):
    cache = made(backend)
    expected = cache.decode(queries())[0]

    def hammer(_):
        refused = 0
        for _ in range(200):
            try:
                assert np.array_equal(cache.decode(queries())[0], expected)
            except RuntimeError:
                refused += 1
        return refused

    with ThreadPoolExecutor(2) as pool:
        assert sum(pool.map(hammer, range(2))) < 400


@pytest.mark.fault("out of memory")
@pytest.mark.parametrize("method", ["prefill", "extend"])
def test_want_of_memory_in_the_middle_leaves_a_cache_as_it_was(backend, monkeypatch, method):
    cache = made(backend)
    expected = cache.decode(queries())[0]
    rows = np.zeros((1, 8, 4, 64), np.float32)

    def full(*_arguments, **_named):
        raise MemoryError("Unable to allocate 9 GiB")

    with monkeypatch.context() as patched:
        patched.setattr(np, "ascontiguousarray", full)
        with pytest.raises(MemoryError):
            getattr(cache, method)(rows, rows, np.array([4]))
    assert cache.lengths.tolist() == [TOKENS]
    assert np.array_equal(cache.decode(queries())[0], expected)


COMPILES = """
import sys
import numpy as np
from elastickv.backends import load
from elastickv.recipe import AttentionShape, Recipe


class Report:
    def phase(self, name):
        print("phase", name)

    def progress(self, done, total):
        print("progress", done, total)


backend, _ = load("cpu", report=Report())
cache = backend.cache(AttentionShape(1, 2, 2, 64), 300, "bf16", Recipe.parse(sys.argv[1]))
cache.fill_random(np.array([300]), 0)
print("decoded", np.isfinite(cache.decode(np.ones((1, 2, 64), np.float32))[0]).all())
"""


def compiling(folder, recipe, **variables):
    environment = os.environ | {"PYTHONPATH": str(Path(elastickv.__file__).parents[1]), "ELASTICKV_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", COMPILES, recipe]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.splitlines(), {path.name.split("-")[0] for path in folder.rglob("*.kernel")}


def test_only_what_a_run_needs_is_compiled_with_a_bar_and_once(tmp_path):
    shown, kernels = compiling(tmp_path, "k=int8,v=int4", NUMBA_NUM_THREADS="2")
    unused = {"selection.score_item", "steps.one_token", "readback.read_block", "readback.write_window"}
    stores = "nearest_pages.quantize"
    unused |= {f"{stores}_fp8", f"{stores}_keys_int4", "nearest_pages.store_rows", "ceilings._read"}
    assert {"page.attend_page", f"{stores}_int8", f"{stores}_values_int4"} < kernels
    assert not kernels & unused
    assert shown[0].startswith("phase compiling CPU kernels") and shown[-1] == "decoded True"
    steps = [[int(number) for number in line.split()[1:]] for line in shown if line.startswith("progress")]
    assert steps[0][0] == 0 and steps == sorted(steps) and steps[-1][0] == steps[-1][1] > 0
    shown, again = compiling(tmp_path, "k=int8,v=int4")
    assert shown == ["decoded True"] and again == kernels


def test_a_process_that_cannot_compile_leaves_its_part_to_this_one(monkeypatch):
    compiled = []

    class Uncompiled:
        def __init__(self, name):
            self.name, self.done = name, False

        def is_compiled(self):
            return self.done

        @property
        def address(self):
            self.done = True
            compiled.append(self.name)
            return 1

    kernels = [Uncompiled("page.attend_page"), Uncompiled("decode.no_such_kernel")]
    monkeypatch.setattr(compilation.threads, "count", lambda: 2)
    for executable in ("/no/such/python3", "/no/such/editor", sys.executable):  # the last one does not know the second name
        for kernel in kernels:
            kernel.done = False
        compiled.clear()
        monkeypatch.setattr(compilation.sys, "executable", executable)
        compilation.compile_kernels(kernels, None)
        assert all(kernel.done for kernel in kernels) and set(compiled) == {kernel.name for kernel in kernels}


def test_the_slowest_kernels_are_shared_out_and_one_processor_gets_no_process():
    kernels = [page.attend_page, decode.decode_item, storage.append_token, steps.attend]
    own, *others = compilation.shares(kernels, 2)
    assert page.attend_page in own and decode.decode_item in others[0] and len(others) == 1
    assert compilation.shares(kernels, 1) == [[page.attend_page, decode.decode_item, storage.append_token, steps.attend]]
    assert compilation.shares([steps.attend], 3) == [[steps.attend]]
