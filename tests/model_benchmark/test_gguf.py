"""llama.cpp as a reference: its speed, bytes and predictions, and one line for what it can't do."""

import json
import os
import struct

import jsonschema
import numpy as np
import pytest

import elastickv
from elastickv.errors import DoesNotFit, UsageError
from elastickv.evaluation.metrics import Scores
from elastickv.model_benchmark.baseline_result import SCHEMA_PATH, baseline_schema
from elastickv.model_benchmark.gguf_file import KV_TYPES, read_gguf
from elastickv.model_benchmark.quality_delta import quality_delta
from tests.helpers.tiny_models import tiny_gguf

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def measured(model):
    pytest.importorskip("xllamacpp")
    from elastickv.model_benchmark.presets import gguf_baseline

    return gguf_baseline(str(model), context=256, reps=4, decode_tokens=4, scored=6, threads=1)


def test_the_result_is_what_the_schema_file_describes(measured):
    schema = json.loads(SCHEMA_PATH.read_text())
    assert schema == baseline_schema(), "run: python -m elastickv.model_benchmark.baseline_result"
    jsonschema.validate(json.loads(json.dumps(measured)), schema)


def test_types_take_turns_and_are_held_against_the_first(measured):
    assert [cache["cache"] for cache in measured["caches"]] == ["f16", "q8_0", "q4_0"]
    assert all(len(cache["decode_s"]) == len(cache["prompt_s"]) == 4 for cache in measured["caches"])
    assert set(measured["speedups"]) == {"q8_0", "q4_0"} and measured["baseline"] == "f16"
    for cache in measured["caches"]:
        mean = np.mean(cache["decode_s"]) / 4
        assert cache["tokens_per_s"] == pytest.approx(1 / mean)
        assert cache["step_ms"]["low"] <= cache["step_ms"]["estimate"] <= cache["step_ms"]["high"]


def test_bytes_are_those_of_the_types_blocks_and_of_our_accounting(measured):
    by_type = {cache["cache"]: cache["kv_bytes_per_token"] for cache in measured["caches"]}
    elements = 2 * 2 * 64  # layers, keys and values, channels
    assert by_type == {"f16": elements * 2, "q8_0": elements * 34 / 32, "q4_0": elements * 18 / 32}
    ours = {own["recipe"]: own for own in measured["formats"]}
    assert ours["int8"]["kv_bytes_per_cold_token"] < by_type["f16"] / 1.8
    assert ours["int4"]["kv_bytes_per_cold_token"] < ours["int8"]["kv_bytes_per_cold_token"] / 1.5
    # 132 of 256 tokens are sinks and window, in 16 bit.
    assert ours["int4"]["kv_bytes_per_token"] > ours["int4"]["kv_bytes_per_cold_token"]


def test_fewer_bits_cost_more_and_the_reference_costs_nothing(measured):
    f16, q8, q4 = (cache["fidelity"] for cache in measured["caches"])
    assert f16["kl_max"] == 0 and f16["top1_percent"] == 100
    assert 0 < q8["kl_mean"] < q4["kl_mean"]
    assert f16["perplexity"] == q4["reference_perplexity"] != q4["perplexity"]
    assert (q4["tokens"], q4["context"], q4["reference"]) == (6, 256, "f16")


def test_its_file_is_loaded_shown_and_compared_type_by_type(measured, tmp_path):
    path = tmp_path / "gguf.json"
    path.write_text(json.dumps(measured), encoding="utf-8")
    loaded = elastickv.load(path)
    assert loaded.as_dict() == json.loads(json.dumps(measured))
    assert [row["cache"] for row in loaded.rows()] == ["f16", "q8_0", "q4_0"]
    assert str(loaded).startswith(measured["model"]["name"]) and "q4_0" in loaded._repr_html_()
    rows = {row.figure: row for row in elastickv.compare(path, path).rows}
    for cache in measured["caches"]:
        assert rows[f"token, {cache['cache']}"].fidelity.a.mean == cache["fidelity"]["kl_mean"]


@pytest.mark.parametrize(
    ("tokenizer", "prefix"),
    [({}, [1]), ({"add_bos_token": False}, []), ({"add_bos_token": True, "add_eos_token": True}, [1])],
    ids=["beginning", "none", "beginning and end"],
)
def test_a_prompt_begins_as_the_file_says_and_its_end_stays_open(tmp_path, tokenizer, prefix):
    pytest.importorskip("xllamacpp")
    from elastickv.model_benchmark.llama_cpp import Llama

    llama = Llama(read_gguf(str(tiny_gguf(tmp_path / "tiny.gguf", tokenizer=tokenizer))), "f16", 64, 1)
    assert list(llama.prefix) == prefix
    assert llama.encoded("ab") == [ord(letter) + 3 for letter in "ab"]


def test_both_baselines_read_the_same_prompt(tmp_path):
    pytest.importorskip("xllamacpp")
    pytest.importorskip("transformers")
    from elastickv.model_benchmark.presets import gguf_baseline, transformers_baseline

    # Transformers reads no `add_space_prefix` from a file: it always puts a space first.
    path = tiny_gguf(tmp_path / "tiny.gguf", tokenizer={"add_space_prefix": True})
    sizes = {"context": 200, "reps": 2, "decode_tokens": 1, "scored": 0}
    with_llama = gguf_baseline(str(path), kv_types=("f16",), threads=1, **sizes)
    with_transformers = transformers_baseline(str(path), dtype="fp32", device="cpu", recipe="int8", **sizes)
    assert with_llama["prompt"] == with_transformers["prompt"]
    assert with_llama["prompt"]["prefix"] == [1]
    for result in (with_llama, with_transformers):
        loaded = elastickv.load(_written(tmp_path / "result.json", result))
        assert f"prompt: begins with special token 1, tokens {result['prompt']['hash']}" in str(loaded)


def _written(path, result):
    path.write_text(json.dumps(result), encoding="utf-8")
    return path


def test_predictions_are_not_measured_where_there_is_no_text_for_them(model):
    pytest.importorskip("xllamacpp")
    from elastickv.benchmark.reporter import SilentReporter
    from elastickv.evaluation.texts import Text
    from elastickv.model_benchmark.gguf import GgufBench, measure

    sizes = {"context": 64, "rounds": 2, "tokens": 1, "scored": 6, "seed": 0, "threads": 1}
    result = measure(GgufBench(str(model), ("q8_0", "f16"), text=Text("short.txt", "To be"), **sizes), (), SilentReporter())
    assert "short.txt has" in result["fidelity_not_measured"]
    assert all(cache["fidelity"] is None for cache in result["caches"])
    assert result["baseline"] == "q8_0"


def test_a_quality_delta_is_the_mean_of_its_tokens():
    full, own = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    kl = np.array([[0.0, 1.0]])
    delta = quality_delta("f16", "t", 7, Scores(-full, -own, kl, np.array([[1.0, 0.0]])))
    assert delta.reference_perplexity == pytest.approx(2) and delta.perplexity == pytest.approx((0.25 * 0.75) ** -0.5)
    assert (delta.kl_mean, delta.kl_max, delta.top1_percent, delta.tokens) == (0.5, 1, 50, 2)


def test_bytes_of_a_block_are_llama_cpps_own():
    for name, block in KV_TYPES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]] == block


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        (b"", "not a .gguf file"),
        (b"PK\x03\x04", "not a .gguf file"),
        (b"GGUF" + b"\xff" * 60, "damaged"),
    ],
)
def test_what_is_no_model_is_one_line(tmp_path, content, said):
    path = tmp_path / "some.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=said) as refused:
        read_gguf(str(path))
    assert "\n" not in str(refused.value)


def test_a_shape_has_no_file():
    with pytest.raises(UsageError, match=r"shape:8b has random weights and no file: give a \.gguf file"):
        read_gguf("shape:8b")


@pytest.mark.parametrize("length", [20, 3000, 100_000])
def test_a_file_that_was_cut_off_is_refused(tmp_path, model, length):
    (tmp_path / "cut.gguf").write_bytes(model.read_bytes()[:length])
    with pytest.raises(UsageError, match="damaged or cut off"):
        read_gguf(str(tmp_path / "cut.gguf"))


def text(value):
    return struct.pack("<Q", len(value)) + value


def field(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def header(*fields, tensors=0, version=3, count=None):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, len(fields) if count is None else count) + b"".join(fields)


def number(value):
    return struct.pack("<I", value)


LLAMA = {
    "general.architecture": (8, text(b"llama")),
    "llama.block_count": (4, number(1)),
    "llama.attention.head_count": (4, number(2)),
    "llama.embedding_length": (4, number(128)),
    "llama.context_length": (4, number(64)),
    "tokenizer.ggml.tokens": (9, struct.pack("<IQ", 8, 1) + text(b"a")),
}
TENSOR = text(b"t") + struct.pack("<IQIQ", 1, 4, 0, 0)


def llama_cpp(tensor=TENSOR, **changed):
    fields = LLAMA | {key.replace("__", "."): value for key, value in changed.items()}
    return (header(*(field(key.encode(), *value) for key, value in fields.items()), tensors=1) + tensor).ljust(1 << 10, b"\0")


def test_a_made_header_of_the_least_fields_is_read(tmp_path):
    (tmp_path / "m.gguf").write_bytes(llama_cpp())
    model = read_gguf(str(tmp_path / "m.gguf"))
    assert (model.layers, model.query_heads, model.kv_heads, model.key_dim, model.vocabulary) == (1, 2, (2,), 64, 1)


ENDLESS = 2**61
CRAFTED = {
    "version": header(version=99),
    "other byte order": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "fields": header(count=2**64 - 1),
    "tensors": header(tensors=2**64 - 1),
    "text": header(struct.pack("<Q", 2**64 - 1)),
    "list": header(field(b"a", 9, struct.pack("<IQ", 4, ENDLESS))),
    "list of nothing": header(field(b"a", 9, struct.pack("<IQ", 99, ENDLESS))),
    "lists in lists": header(field(b"a", 9, struct.pack("<IQ", 9, 1) * 5000)),
    "type": header(field(b"a", 77, b"")),
    "twice": header(*[field(b"a", 4, number(1))] * 2),
    "alignment": llama_cpp(general__alignment=(4, number(0))),
    "alignment of text": llama_cpp(general__alignment=(8, text(b"x"))),
    "offset": llama_cpp(text(b"t") + struct.pack("<IQIQ", 1, 4, 0, 2**60)),
    "axes": llama_cpp(text(b"t") + struct.pack("<I", 2**31)),
    "elements": llama_cpp(text(b"t") + struct.pack("<IQQQQIQ", 4, *[2**40] * 4, 0, 0)),
    "format": llama_cpp(text(b"t") + struct.pack("<IQIQ", 1, 4, 999, 0)),
    "layers": llama_cpp(llama__block_count=(4, number(2**32 - 1))),
    **{
        f"a list of {key}": llama_cpp(**{f"llama__{key}": (9, struct.pack("<IQI", 4, 1, 1))})
        for key in ("block_count", "embedding_length", "context_length", "attention__key_length", "attention__value_length")
    },
    "layers of text": llama_cpp(llama__block_count=(8, text(b"x"))),
    "layers of nan": llama_cpp(llama__block_count=(6, struct.pack("<f", float("nan")))),
    "heads of text": llama_cpp(llama__attention__head_count=(9, struct.pack("<IQ", 8, 1) + text(b"x"))),
    "no heads": llama_cpp(llama__attention__head_count=(9, struct.pack("<IQI", 4, 1, 0))),
    "key length": llama_cpp(llama__attention__key_length=(5, struct.pack("<i", -5))),
    "KV heads": llama_cpp(llama__attention__head_count_kv=(9, struct.pack("<IQ3I", 4, 3, 1, 1, 1))),
}


@pytest.mark.parametrize("content", CRAFTED.values(), ids=CRAFTED)
def test_a_header_that_claims_what_cannot_be_is_refused_at_once(tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(UsageError, match=r"damaged or cut off|is damaged|no language model"):
        read_gguf(str(tmp_path / "m.gguf"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(UsageError, match="not a regular file"):
        read_gguf(str(tmp_path / "m.gguf"))


def test_a_folder_and_a_hub_id_without_a_file_are_refused(tmp_path):
    for name, said in ((tmp_path, "is a folder"), ("someone/model", "OWNER/NAME:FILE.gguf")):
        with pytest.raises(UsageError, match=said):
            read_gguf(str(name))


def test_bytes_that_sizes_do_not_tell_are_not_counted(tmp_path):
    sliding = read_gguf(str(tiny_gguf(tmp_path / "s.gguf", attention__sliding_window=128)))
    assert "sliding window" in sliding.uncounted


def test_heads_that_blocks_do_not_divide_are_refused(tmp_path):
    odd = read_gguf(str(tiny_gguf(tmp_path / "odd.gguf", head_dim=80, layers=1)))
    odd.check_type("f16")
    with pytest.raises(UsageError, match="blocks of 32"):
        odd.check_type("q8_0")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"context": 5000}, "2048 positions"),
        ({"kv_types": ("q9",)}, "q9 is unknown"),
        ({"kv_types": ()}, "unknown"),
        ({"kv_types": ("f16", "f16")}, "twice"),
        ({"reps": 1}, "`reps`=1"),
        ({"context": 1}, "`context`=1"),
        ({"scored": -1}, "`scored`=-1"),
        ({"threads": 0}, "`threads`=0"),
        ({"decode_tokens": 0}, "`decode_tokens`=0"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, options, said):
    pytest.importorskip("xllamacpp")
    from elastickv.model_benchmark.presets import gguf_baseline

    with pytest.raises(UsageError, match=said):
        gguf_baseline(str(model), **options)


def test_what_does_not_fit_the_memory_is_refused_before_it_is_opened(model, monkeypatch):
    pytest.importorskip("xllamacpp")
    from elastickv.model_benchmark import gguf

    monkeypatch.setattr(gguf, "device", lambda: {"name": "CUDA0", "memory_free": 1 << 20})
    monkeypatch.setattr(gguf, "Llama", None)
    with pytest.raises(DoesNotFit, match="shorter `context`"):
        gguf.measure(gguf.GgufBench(str(model), ("f16",), 512, 2, 1, 0, 0, None), (), None)


def test_missing_bindings_are_named_with_the_command_that_installs_them(model, monkeypatch):
    from elastickv.model_benchmark import llama_cpp, presets

    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'xllamacpp and gguf not installed: pip install "elastickv\[gguf\]"'):
        presets.gguf_baseline(str(model))
