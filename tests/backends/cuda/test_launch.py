"""Every launch passes what its kernel takes: names and C types of the source, number, order and sizes as compiled; no GPU."""

import ctypes
import inspect
import math
import re

import numpy as np
import pytest

pytest.importorskip("cuda.bindings.nvrtc")
from elastickv.backends.cuda import backend as backend_module
from elastickv.backends.cuda import block_launch, compiler, launch
from elastickv.backends.cuda.arguments import F32, I32, I64, U64, Address, StoreArguments
from elastickv.backends.cuda.backend import CudaBackend
from elastickv.backends.cuda.kernel_selection import (
    TYPES,
    Split,
    blocks_variant,
    ceilings_variant,
    decode_variant,
    split_variant,
)
from elastickv.backends.feedback import Feedback
from elastickv.kvcache.tensor_view import TensorView
from elastickv.recipe import AttentionShape, Recipe
from tests.backends.cuda.recording_device import RecordingDevice

ARCH = "90"
PTX_TYPES = {
    ctypes.c_void_p: "u64",
    ctypes.c_longlong: "u64",
    ctypes.c_ulonglong: "u64",
    ctypes.c_int: "u32",
    ctypes.c_float: "f32",
}
C_TYPES = {
    "int": ctypes.c_int,
    "long long": ctypes.c_longlong,
    "u64": ctypes.c_ulonglong,
    "float": ctypes.c_float,
}
KERNEL = re.compile(r"__global__(?:\s+(?:void|[A-Z_]+|__launch_bounds__\([^)]*\)))*\s+(\w+)\(([^{]*)\) \{")


def variants():
    """One build of every source, and both builds of the sources that pages change."""
    pages, rows = Recipe.parse("int4,pages=1/4"), Recipe.parse("int8")
    tensor_cores = decode_variant(128, 4, "bf16", rows, ARCH, "mma")
    paged = decode_variant(128, 4, "bf16", pages, ARCH)
    yield from (paged, paged.fixed(), paged.storing(), paged.editing(), paged.selecting())
    yield from (paged.storing("kv"), paged.editing("kv"), paged.rotating())
    yield blocks_variant(128, 4, "bf16", Recipe.parse("int4"), ARCH)
    serving = blocks_variant(128, 4, "bf16", pages, ARCH)
    yield from (serving, serving.storing_blocks(), serving.selecting_blocks())
    yield from (tensor_cores, tensor_cores.storing(), tensor_cores.editing(), split_variant(tensor_cores, 4, Split(8, True)))
    yield from (decode_variant(128, 4, "bf16", recipe, ARCH, "simt") for recipe in (pages, rows))
    yield ceilings_variant(ARCH)


VARIANTS = tuple(dict.fromkeys(variants()))


def compiled_signatures(variant):
    """The PTX types of each kernel's parameters, by kernel."""
    from cuda.bindings import nvrtc

    source = (compiler.KERNELS / f"{variant.source}.cu").read_bytes()
    _, program = nvrtc.nvrtcCreateProgram(source, b"x.cu", 0, [], [])
    options = [
        o.replace("=sm_", "=compute_") for o in compiler._options(variant.arch, dict(variant.macros)) if "ptxas" not in o
    ]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    assert int(status) == 0
    _, size = nvrtc.nvrtcGetPTXSize(program)
    text = bytes(size)
    nvrtc.nvrtcGetPTX(program, text)
    nvrtc.nvrtcDestroyProgram(program)
    entries = re.findall(r"\.entry (\w+)\s*\(([^)]*)\)", text.decode())
    return {name: [p.split()[1].lstrip(".") for p in parameters.split(",")] for name, parameters in entries}


def written(parameter):
    """The name and C type of a parameter as the source writes it: PTX does not tell a pointer from a 64-bit number."""
    kind, name = re.fullmatch(r"(.*?)(\w+)", parameter.strip()).groups()
    return name, ctypes.c_void_p if "*" in kind else C_TYPES[kind.strip()]


def source_signatures():
    """The parameters of each kernel in the sources, by kernel: a set, for a kernel may be defined more than once."""
    text = "\n".join(path.read_text() for path in sorted(compiler.KERNELS.iterdir())).replace("\\\n", " ")
    lists = dict(re.findall(r"#define (\w+_SIGNATURE)\s+(.*)", text))
    signatures = {}
    for kernel, parameters in KERNEL.findall(text):
        for macro, expansion in lists.items():
            parameters = re.sub(rf"\b{macro}\b", expansion, parameters)
        signatures.setdefault(kernel, set()).add(tuple(map(written, parameters.split(","))))
    return signatures


def differences(function, compiled, source):
    """What a launch declares otherwise than its kernel does."""
    declared = list(launch.kernel_arguments(function))
    sizes = [PTX_TYPES[ctype] for _, ctype in declared]
    return [
        f"{what}: declared {ours}, in the kernel {theirs}"
        for what, ours, theirs in (
            ("sizes", sizes, compiled),
            ("names", [name for name, _ in declared], [name for name, _ in source]),
            ("types", [ctype for _, ctype in declared], [ctype for _, ctype in source]),
        )
        if ours != theirs
    ]


@pytest.fixture(scope="module")
def signatures():
    if int(ARCH) not in compiler.supported_architectures():
        pytest.skip(f"this NVRTC does not compile for {ARCH}")
    return [(variant, compiled_signatures(variant)) for variant in VARIANTS]


def launch_functions():
    """The launches of both modules, by the kernel's name."""
    declared = {**vars(launch), **vars(block_launch)}
    return {name: f for name, f in declared.items() if inspect.isfunction(f) and hasattr(f, "__wrapped__")}


def test_every_kernel_has_one_launch_with_its_signature_as_compiled(signatures):
    functions, sources = launch_functions(), source_signatures()
    compiled = {kernel for _, kernels in signatures for kernel in kernels}
    assert compiled == set(functions) == set(sources)
    for variant, kernels in signatures:
        for kernel, types in kernels.items():
            (parameters,) = sources[kernel]
            assert not differences(functions[kernel], types, parameters), (variant, kernel)


def test_an_argument_that_is_dropped_reordered_or_of_another_type_is_noticed(signatures):
    compiled = next(kernels for variant, kernels in signatures if variant.source == "ceilings")["copy"]
    (source,) = source_signatures()["copy"]

    @launch.kernel
    def dropped(*, source: Address, target: Address):
        return (1,)

    @launch.kernel
    def reordered(*, target: Address, source: Address, vectors: I64):
        return (1,)

    @launch.kernel
    def narrower(*, source: Address, target: Address, vectors: I32):
        return (1,)

    @launch.kernel
    def floating(*, source: Address, target: Address, vectors: F32):
        return (1,)

    @launch.kernel
    def an_address(*, source: Address, target: Address, vectors: Address):
        return (1,)

    @launch.kernel
    def unsigned(*, source: Address, target: Address, vectors: U64):
        return (1,)

    @launch.kernel
    def in_a_struct(*, source: StoreArguments):
        return (1,)

    def noticed(function):
        return [difference.partition(":")[0] for difference in differences(function, compiled, source)]

    assert noticed(launch.copy) == []
    assert noticed(dropped) == noticed(in_a_struct) == ["sizes", "names", "types"]
    assert noticed(reordered) == ["names"]
    assert noticed(narrower) == noticed(floating) == ["sizes", "types"]
    assert noticed(an_address) == noticed(unsigned) == ["types"]


def test_at_most_eight_arguments_stand_alone():
    for name, function in launch_functions().items():
        parameters = inspect.signature(inspect.unwrap(function)).parameters.values()
        assert sum(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters) <= 8, name


def test_arguments_are_packed_in_the_order_of_the_kernel_not_of_the_call():
    device, variant = RecordingDevice(), ceilings_variant(ARCH)
    launch.copy(device, variant, 7, vectors=1 << 40, target=None, source=123)
    (recorded,) = device.take()
    assert recorded.arguments == ((ctypes.c_void_p, 123), (ctypes.c_void_p, None), (ctypes.c_longlong, 1 << 40))
    assert (recorded.source, recorded.kernel, recorded.grid, recorded.threads) == ("ceilings", "copy", (7,), 256)
    with pytest.raises(TypeError):
        launch.copy(device, variant, 7, vectors=1, target=None)


@pytest.fixture
def device(monkeypatch):
    device = RecordingDevice()
    monkeypatch.setattr(backend_module, "CudaDevice", lambda *_: device)
    return device


SHAPE = AttentionShape(3, 10, 2, 80)
STRIDES = [f"{rows}_{index}" for rows in ("key", "value") for index in ("batch", "head", "token")]


def single(recorded, kernel):
    (match,) = [each for each in recorded if each.kernel == kernel]
    return match


def test_a_step_appends_selects_and_decodes_with_the_buffers_and_sizes_of_its_cache(device):
    cache = CudaBackend().cache(SHAPE, 900, "bf16", Recipe.parse("int4,pages=1/4,anchor_every=4,sinks=3,window=40"), 2)
    cache.fill_random(np.full(3, 700), 5)
    device.take()
    keys, values = (
        TensorView(1 << 20, "bf16", (3, 2, 72), (777, 155, 1)),
        TensorView(2 << 20, "bf16", (3, 2, 72), (778, 156, 1)),
    )
    queries = TensorView(3 << 20, "bf16", (3, 10, 72), (900, 91, 1))
    outputs, lse = TensorView(4 << 20, "fp16", (3, 10, 80), (800, 80, 1)), TensorView(5 << 20, "fp32", (3, 10), (10, 1))
    cache.enqueue_step(keys, values, queries, 1.25, outputs, lse)
    recorded, s = device.take(), cache.storage
    assert [each.kernel for each in recorded] == ["append_rows", "select", "decode"]
    append, select, decode = recorded
    names = ("exact_k", "exact_v", "cold_k", "cold_v", "k_scale", "v_scale", "cold_pages")
    planes = {name: getattr(s, name).pointer for name in names}
    sizes = {"sinks": 3, "window": 40, "ring": 96, "stride": 1, "exact_rows": 99, "cold_rows": 832}
    keys = {"keys": 1 << 20, "key_batch_stride": 777, "key_head_stride": 155, "key_token_stride": 0}
    values = {"values": 2 << 20, "value_batch_stride": 778, "value_head_stride": 156, "value_token_stride": 0}
    queries = {"query_rows": 3 << 20, "query_batch_stride": 900, "query_head_stride": 91, "queries": s.queries.pointer}
    numbers = {"capacity": 900, "kv_heads": 2, "group": 5, "query_scale": 1.25, "type": TYPES["bf16"], "dim": 72}
    stored = {**planes, **sizes, "bad": s.bad.pointer, "state": s.state.pointer}
    assert append.values == {**stored, **keys, **values, **queries, **numbers}
    assert (append.source, append.grid, append.threads, append.shared_bytes) == ("append", (6, 2), 256, 0)

    pages = {"listed_pages": s.lists.pointer, "listed": s.listed.pointer, "page_capacity": 26}
    anchors = {"anchor_every": 4, "anchor_offset": 2}
    scratch = cache._scratch
    assert select.values == {
        **{"query": s.queries.pointer, "cold_pages": s.cold_pages.pointer, "page_stride": 3584, "sinks": 3},
        **{"state": s.state.pointer, "window": 40},
        **{"counts": s.counts.pointer, "counts_stride": 27, "scores": scratch.scores.pointer, "after_append": 1},
        **{"counters": scratch.counters.pointer, "kv_heads": 2, "group": 5, **pages, **anchors},
    }
    assert (select.source, select.grid, select.threads) == ("select", (1, 6), 256)

    variant, blocks = cache._decoding
    assert variant.uses_split_kv_buffer
    partials = {"partial": scratch.split_kv_buffer.pointer, "partial_ml": scratch.split_kv_buffer_ml.pointer}
    results = {"query": s.queries.pointer, "output": 4 << 20, "lse": 5 << 20, "output_type": TYPES["fp16"]}
    reused = {"cached_output": s.cached_output.pointer, "cached_lse": s.cached_output.pointer + 3 * 10 * 80 * 4}
    scales = {"log2_decay": 0.0, "scale_log2": pytest.approx(math.log2(math.e) / math.sqrt(80))}
    heads = {"batch": 3, "kv_heads": 2, "group": 5, "passes": 1}
    assert decode.values == {
        **{**planes, **sizes, **pages, **anchors, **partials, **results, **reused, **scales, **heads},
        **{"state": s.state.pointer, "counters": scratch.counters.pointer},
    }
    assert (decode.grid, decode.threads, decode.shared_bytes) == ((blocks,), variant.threads, variant.shared_bytes)


def test_lengths_that_differ_decode_with_partial_results_of_shared_work(device):
    cache = CudaBackend("pages").cache(SHAPE, 900, "bf16", Recipe.parse("int8"))
    cache.fill_random(np.array([700, 20, 5]), 5)
    device.take()
    cache.decode(np.zeros((3, 10, 80), np.float32))
    values = single(device.take(), "decode").values
    assert (values["partial"], values["partial_ml"]) == (cache._scratch.partial.pointer, cache._scratch.partial_ml.pointer)
    assert (values["output"], values["lse"]) == (cache.storage.outputs.pointer, cache.storage.lse.pointer)


def test_rotated_tensors_are_stored_read_and_cropped_by_kernels_that_rotate_and_outputs_are_rotated_back(device):
    programs = {}
    for rotate in ("", "k", "v", "kv"):
        text = "int4,pages=1/4,sinks=3,window=40" + f",rotate={rotate}" * bool(rotate)
        cache = CudaBackend().cache(SHAPE, 900, "bf16", Recipe.parse(text))
        cache.prefill(*np.zeros((2, 3, 2, 300, 80), np.float32), np.full(3, 300))
        cache.append(*np.zeros((2, 3, 2, 80), np.float32))
        cache.decode(np.zeros((3, 10, 80), np.float32))
        cache.read(0, 200)
        cache.crop(np.full(3, 200))
        recorded = device.take()
        programs[rotate] = [each.kernel for each in recorded]
        wanted = {} if not rotate else {"ROTATED": {"k": 1, "v": 2, "kv": 3}[rotate]}
        built = [variant for variant in device.variants if variant.source in ("append", "edit")]
        assert built and all({n: v for n, v in variant.macros if n == "ROTATED"} == wanted for variant in built)
        assert all("ROTATED" not in dict(variant.macros) for variant in device.variants if variant not in built)
        device.variants.clear()
        decode = single(recorded, "decode")
        if "v" in rotate:
            back, s = single(recorded, "rotate_rows"), cache.storage
            assert recorded.index(back) == recorded.index(decode) + 1
            assert decode.values["output"] == s.outputs.pointer and decode.values["output_type"] == TYPES["fp32"]
            assert back.values == {
                **{"source": s.outputs.pointer, "output": s.outputs.pointer, "rows": 30, "output_type": TYPES["fp32"]},
            }
            assert back.grid == (4,)
    assert programs["k"] == programs[""] and programs["kv"] == programs["v"]


def test_an_output_of_16_bit_is_rotated_back_from_float32(device):
    cache = CudaBackend().cache(SHAPE, 900, "bf16", Recipe.parse("int8,rotate=v"))
    cache.fill_random(np.full(3, 700), 5)
    device.take()
    tokens = [TensorView(n << 20, "bf16", (3, 2, 80), (160, 80, 1)) for n in (1, 2)]
    queries = TensorView(3 << 20, "bf16", (3, 10, 80), (800, 80, 1))
    outputs, lse = TensorView(4 << 20, "fp16", (3, 10, 80), (800, 80, 1)), TensorView(5 << 20, "fp32", (3, 10), (10, 1))
    cache.enqueue_step(*tokens, queries, 1.0, outputs, lse)
    append, decode, back = device.take()
    assert [each.kernel for each in (append, decode, back)] == ["append_rows", "decode", "rotate_rows"]
    scratch = cache.storage.outputs.pointer
    assert (decode.values["output"], decode.values["output_type"], decode.values["lse"]) == (scratch, TYPES["fp32"], 5 << 20)
    assert (back.values["source"], back.values["output"], back.values["output_type"]) == (scratch, 4 << 20, TYPES["fp16"])


def test_a_token_without_a_decode_and_one_of_the_previous_layer_are_appended(device):
    cache = CudaBackend().cache(SHAPE, 900, "fp32", Recipe.parse("bf16,stride=3,sinks=3,window=40"))
    cache.append(*np.zeros((2, 3, 2, 80), np.float32))
    values = single(device.take(), "append_rows").values
    assert values["query_rows"] is None and values["query_scale"] == 1 and values["type"] == TYPES["fp32"]
    assert (values["key_batch_stride"], values["key_head_stride"], values["key_token_stride"]) == (160, 80, 80)
    outputs, queries, tables = (device.allocate(64) for _ in range(3))
    cache.launch_feedback(outputs, queries, tables, Feedback.seeded(80, 5, 1.0, 0.5, 0.25))
    values = single(device.take(), "append").values
    assert (values["outputs"], values["queries"], values["tables"]) == (outputs.pointer, queries.pointer, tables.pointer)
    assert (values["query_rms"], values["key_rms"], values["value_rms"], values["group"]) == (1.0, 0.5, 0.25, 5)


def test_chunks_reads_and_crops_pass_their_sizes(device):
    cache = CudaBackend().cache(SHAPE, 900, "bf16", Recipe.parse("int4,sinks=3,window=40"))
    shape = (3, 2, 300, 72)
    keys, values = TensorView(1 << 20, "fp16", shape, (777, 55, 33, 1)), TensorView(2 << 20, "fp16", shape, (778, 56, 34, 1))
    cache.extend(keys, values, np.array([300, 65, 1]))
    cold, exact, state = device.take()[-3:]
    assert [cold.kernel, exact.kernel, state.kernel] == ["extend_cold", "extend_exact", "set_state"]
    assert (cold.grid, exact.grid) == ((10, 2, 6), (38, 2, 6)) and cold.arguments == exact.arguments
    strides = {f"{name}_stride": cold.values[f"{name}_stride"] for name in STRIDES}
    assert strides == dict(zip(strides, (777, 55, 33, 778, 56, 34), strict=True))
    assert (cold.values["keys"], cold.values["values"], cold.values["dim"]) == (1 << 20, 2 << 20, 72)
    assert cold.values["added"] == cache.storage.lengths.pointer + 12 and cold.values["type"] == TYPES["fp16"]
    assert (state.values["step"], state.values["all_finite"], state.values["kv_heads"], state.values["heads"]) == (-1, 0, 2, 6)
    strides = (2 * 70 * 72, 70 * 72, 72, 1)
    cache.read(30, 100, tuple(TensorView(address, "bf16", (3, 2, 70, 72), strides) for address in (7 << 20, 8 << 20)))
    read = single(device.take(), "read_rows")
    expected = {"first": 30, "last": 100, "keys": 7 << 20, "values": 8 << 20, "type": TYPES["bf16"], "dim": 72, "heads": 6}
    assert read.values.items() >= expected.items() and read.grid == (4, 2, 6)
    cache.crop(np.array([290, 60, 1]))
    crop = single(device.take(), "crop_rows")
    assert crop.values["lengths"] == cache.storage.lengths.pointer and crop.grid == (1, 2, 6)
    cache.reorder(np.array([1, 0, 2]))
    copies = [each for each in device.take() if each.kernel == "copy_rows"]
    assert [each.values["heads"] for each in copies] == [4, 4] and {each.grid[2] for each in copies} == {4}
    assert all(each.values["to_rows"] - each.values["from_rows"] == 8 for each in copies)
