"""What `--input` accepts, and that everything else is one clear line."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from elastickv.benchmark.sample_inputs import MIN_QUERIES, SAMPLE_PATH, load_sample
from elastickv.errors import UsageError
from elastickv.kvcache.rounding import rounded, to_bf16_bits

LAYERS, QUERY_HEADS, KV_HEADS, TOKENS, HEAD_DIM = 2, 6, 3, 70, 64
Q_SHAPE = (LAYERS, QUERY_HEADS, MIN_QUERIES, HEAD_DIM)
KV_SHAPE = (LAYERS, KV_HEADS, TOKENS, HEAD_DIM)


def tensors(dtype: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"q": Q_SHAPE, "k": KV_SHAPE, "v": KV_SHAPE}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def raw_file(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def bf16_file(arrays: dict[str, np.ndarray]) -> bytes:
    header, data = {}, b""
    for name, array in arrays.items():
        raw = to_bf16_bits(array).tobytes()
        header[name] = {"dtype": "BF16", "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return raw_file(header, data)


def refusal(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        load_sample(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "input.safetensors"


def test_the_shipped_sample_is_real_small_and_described() -> None:
    sample = load_sample()
    assert SAMPLE_PATH.stat().st_size <= 4_000_000
    assert sample.tokens == 4096
    assert sample.layers == 3
    assert sample.queries >= MIN_QUERIES
    assert sample.shape.group == 3
    assert {"model", "text", "layers", "heads", "mean_errors", "rope", "captured", "licence", "script"} <= set(sample.metadata)
    assert sample.query_rms == pytest.approx(np.sqrt(np.mean(sample.q.astype(np.float64) ** 2)))
    assert sample.key_rms > 0
    assert sample.value_rms > 0


def test_the_shipped_samples_heads_are_easy_and_hard_and_about_as_hard_as_all() -> None:
    metadata = load_sample().metadata
    selection = [float(error) for error in re.findall(r"selection ([0-9.]+)", metadata["heads"])]
    assert selection == sorted(selection)
    assert selection[-1] > 3 * selection[0]
    rounding_of_all, selection_of_all, rounding, selected = map(float, re.findall(r"0\.[0-9]+", metadata["mean_errors"]))
    assert rounding == pytest.approx(rounding_of_all, rel=0.1)
    assert selected == pytest.approx(selection_of_all, rel=0.1)


@pytest.mark.parametrize(
    ("context", "tokens"), [(1, 256), (256, 256), (340, 256), (400, 512), (1024, 1024), (4096, 4096), (32768, 4096)]
)
def test_the_shipped_sample_is_cut_to_the_nearest_context(context: int, tokens: int) -> None:
    whole = load_sample()
    sample = whole.at(context)
    assert (sample.tokens, sample.queries) == (tokens, 80)
    assert not sample.earlier
    np.testing.assert_array_equal(sample.k, whole.k[:, :, :tokens])
    np.testing.assert_array_equal(sample.q, whole.q if tokens == 4096 else whole.earlier[tokens])


def test_queries_of_earlier_positions_are_read(path: Path) -> None:
    arrays = tensors()
    earlier = np.ones((LAYERS, QUERY_HEADS, MIN_QUERIES, HEAD_DIM), np.float32)
    save_file(arrays | {"q_66": earlier, "q_x": earlier, "other": earlier}, path)
    sample = load_sample(path)
    assert list(sample.earlier) == [66]
    np.testing.assert_array_equal(sample.at(65).q, earlier)
    np.testing.assert_array_equal(sample.at(70).q, arrays["q"])


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("q_66", (LAYERS, QUERY_HEADS, MIN_QUERIES, 32), "give it the shape of 'q'"),
        ("q_66", (LAYERS, QUERY_HEADS, MIN_QUERIES), "give it the shape of 'q'"),
        ("q_66", (LAYERS, QUERY_HEADS, MIN_QUERIES - 1, HEAD_DIM), "has 63 queries"),
        ("q_65", (LAYERS, QUERY_HEADS, 66, HEAD_DIM), "up to 65"),
        ("q_70", (LAYERS, QUERY_HEADS, MIN_QUERIES, HEAD_DIM), "before token 70"),
        ("q_999999999", (LAYERS, QUERY_HEADS, MIN_QUERIES, HEAD_DIM), "before token 999999999"),
    ],
)
def test_queries_of_earlier_positions_that_do_not_fit_are_refused(
    path: Path, name: str, shape: tuple[int, ...], expected: str
) -> None:
    save_file(tensors() | {name: np.ones(shape, np.float32)}, path)
    assert expected in refusal(path)


def test_a_value_of_earlier_queries_that_is_not_finite_is_named(path: Path) -> None:
    earlier = np.full((LAYERS, QUERY_HEADS, MIN_QUERIES, HEAD_DIM), np.nan, np.float32)
    save_file(tensors() | {"q_66": earlier}, path)
    assert "tensor 'q_66' holds nan at [0, 0, 0, 0] (layers, query_heads, queries, head_dim)" in refusal(path)


@pytest.mark.parametrize(("dtype", "name"), [(np.float32, "fp32"), (np.float16, "fp16")])
def test_values_come_back_as_float32(path: Path, dtype: type, name: str) -> None:
    arrays = tensors()
    save_file({key: array.astype(dtype) for key, array in arrays.items()}, path)
    sample = load_sample(path)
    for key, array in arrays.items():
        read = getattr(sample, key)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, rounded(array, name))


def test_bf16_is_read(path: Path) -> None:
    arrays = tensors()
    path.write_bytes(bf16_file(arrays))
    np.testing.assert_array_equal(load_sample(path).k, rounded(arrays["k"], "bf16"))


def test_metadata_and_name_come_from_the_file(path: Path) -> None:
    save_file(tensors(), path, {"model": "a model"})
    sample = load_sample(path)
    assert (sample.name, sample.metadata["model"]) == ("input", "a model")


def test_a_missing_file_and_a_folder_are_refused(path: Path, tmp_path: Path) -> None:
    assert "does not exist" in refusal(path)
    assert "is not a file" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_missing_tensor_is_named(path: Path, name: str) -> None:
    arrays = tensors()
    del arrays[name]
    save_file(arrays, path)
    assert f"no tensor '{name}'" in refusal(path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"q": Q_SHAPE[1:]}, "(layers, query_heads, queries, head_dim) is needed"),
        ({"k": (*KV_SHAPE, 1)}, "(layers, kv_heads, tokens, head_dim) is needed"),
        ({"v": (LAYERS, KV_HEADS, 0, HEAD_DIM)}, "every size at least 1"),
        ({"v": (LAYERS, KV_HEADS, TOKENS - 1, HEAD_DIM)}, "give both one shape"),
        ({"q": (LAYERS + 1, *Q_SHAPE[1:])}, "3 layers"),
        ({"q": (*Q_SHAPE[:3], 128)}, "128 elements a head"),
        ({"q": (LAYERS, 4, *Q_SHAPE[2:])}, "not a multiple of 3 KV heads"),
        ({"q": (*Q_SHAPE[:3], 65), "k": (*KV_SHAPE[:3], 65), "v": (*KV_SHAPE[:3], 65)}, "head_dim 65 has no kernel"),
        ({"q": (LAYERS, QUERY_HEADS, MIN_QUERIES - 1, HEAD_DIM)}, "63 queries for 70 tokens"),
        ({"q": (LAYERS, QUERY_HEADS, TOKENS + 1, HEAD_DIM)}, "71 queries for 70 tokens"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(path: Path, change: dict[str, tuple[int, ...]], expected: str) -> None:
    save_file(tensors() | {name: np.ones(shape, np.float32) for name, shape in change.items()}, path)
    assert expected in refusal(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_value_that_is_not_finite_is_named_with_its_index(path: Path, value: float, dtype: type) -> None:
    arrays = tensors(dtype)
    arrays["v"][1, 2, 33, 4] = value
    save_file(arrays, path)
    assert f"tensor 'v' holds {value} at [1, 2, 33, 4]" in refusal(path)


def test_other_dtypes_are_refused(path: Path) -> None:
    save_file(tensors() | {"k": np.ones(KV_SHAPE, np.int32)}, path)
    assert "tensor 'k' is I32; F32, F16, BF16 are accepted" in refusal(path)


def test_every_truncation_is_refused(path: Path, tmp_path: Path) -> None:
    save_file(tensors(np.float16), path)
    whole = path.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in (0, 7, 8, 9, 50, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:length])
        refusal(cut)


def test_a_header_that_claims_more_than_the_file_holds_is_refused_before_allocation(path: Path) -> None:
    n_bytes = 2 * (1 << 40)
    entry = {"dtype": "F16", "shape": [1, 1, 1 << 34, 64], "data_offsets": [0, n_bytes]}
    path.write_bytes(raw_file({"q": entry, "k": entry, "v": entry}))
    assert "is cut short" in refusal(path)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"dtype": "F16", "shape": [1, 1, 64, 64], "data_offsets": [0, 10]}, "its offsets span 10"),
        ({"dtype": "F16", "shape": [1, -1, 64, 64], "data_offsets": [0, 10]}, "no whole number from 0 up"),
        ({"dtype": "F16", "shape": [1, 1.5, 64, 64], "data_offsets": [0, 10]}, "no whole number from 0 up"),
        ({"dtype": "F16", "shape": [1, 1, 64, 64], "data_offsets": [10, 0]}, "its offsets span -10"),
        ({"dtype": "F16", "shape": [1, 1, 64, 64]}, "lacks dtype, shape or data_offsets"),
        ({"dtype": ["F16"], "shape": [1], "data_offsets": [0, 2]}, "F32, F16, BF16 are accepted"),
        ("text", "lacks dtype, shape or data_offsets"),
        (None, "lacks dtype, shape or data_offsets"),
    ],
)
def test_corrupt_entries_are_refused(path: Path, entry: object, expected: str) -> None:
    path.write_bytes(raw_file({"q": entry, "k": entry, "v": entry}))
    assert expected in refusal(path)


@pytest.mark.parametrize("header", [[], "text", 3])
def test_a_header_that_is_no_object_is_refused(path: Path, header: object) -> None:
    path.write_bytes(raw_file(header))
    assert "not a JSON object" in refusal(path)


def test_a_header_that_is_no_json_is_refused(path: Path) -> None:
    path.write_bytes((4).to_bytes(8, "little") + b"\xff{{{")
    assert "not JSON" in refusal(path)


def test_a_pickle_is_refused_and_never_loaded(path: Path, tmp_path: Path) -> None:
    trap = tmp_path / "executed"

    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (trap,))

    path.write_bytes(pickle.dumps(Trap()))
    assert "is a pickle" in refusal(path)
    assert not trap.exists()


def test_numpy_files_are_refused_by_name(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **tensors())
    assert "zip archive" in refusal(path)
