"""What fuzzing found (F) and reading for it (R), each once; benchmarks/results/reliability/fuzzing.json lists them."""

import json
import math
import os
import struct
import sys
from io import BytesIO, TextIOWrapper

import pytest

from elastickv.benchmark import Gate, Options
from elastickv.benchmark.sample_inputs import load_sample
from elastickv.benchmark.stats.intervals import SummaryStats, ratio_of_summaries
from elastickv.errors import UsageError
from elastickv.evaluation.suggestion import Tolerance
from elastickv.recipe import AttentionShape, ModelCalibration, Recipe, for_ratio, resolve
from elastickv.results.compare.comparison import compare
from elastickv.results.compare.comparison_table import FORMATS
from elastickv.results.compare.result_sets import read_result_set
from elastickv.results.files import check_writable
from elastickv.sweeps.axes import values
from elastickv.sweeps.plan import SweepPlan, read_plan
from elastickv.sweeps.sweep_result import Sweep
from tests.helpers.results import ORIGINAL, result, write

SHAPE = AttentionShape(1, 4, 2, 64)
DEEP = '{"a":' * 3000 + "1" + "}" * 3000
HEAD = {"version": 1, "plan_hash": "0" * 16, "cells": 1, "axes": {"seq": [1024]}}
CELL = {"cell": {"seq": 1024}, "status": "ok", "reason": None}


@pytest.mark.parametrize(
    "call", [lambda t: Recipe.parse(f"sinks={t}"), Gate.parse, lambda t: values("seq", t), Tolerance.parse]
)
def test_f01_a_message_that_quotes_several_lines_is_one(call):
    with pytest.raises(UsageError) as refused:
        call("1\n\x1b[31m2\udcff")
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("name", ["seq", "heads", "batch", "reps", "compress", "window", "seed", "layers", "time_limit_s"])
@pytest.mark.parametrize("value", [10**400, -(10**400), math.nan, math.inf])
def test_f02_a_number_of_hundreds_of_digits_is_out_of_range(name, value):
    with pytest.raises(UsageError):
        Options(**{name: value})


@pytest.mark.parametrize("name", ["seq", "heads", "kv_heads", "window", "sinks", "reps", "layers", "dim"])
def test_f03_a_count_is_whole(name):
    with pytest.raises(UsageError):
        Options(**{name: 65.5})


@pytest.mark.parametrize("context", [0, -1, 1 << 40, 4096.0])
def test_f04_a_context_is_of_tokens(context):
    for solve in (lambda: for_ratio(2, context, SHAPE), lambda: resolve("stride", 1, context, SHAPE)):
        with pytest.raises(UsageError, match="context"):
            solve()


@pytest.mark.parametrize("text", ['{"a": ' + "9" * 5000 + "}", '{"a": 1e999}', DEEP])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_f05_json_with_what_python_cannot_hold_is_refused(tmp_path, text, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_text(text)
    with pytest.raises(UsageError, match="is no JSON"):
        read_result_set(path, "A")
    plan = tmp_path / "plan.json"
    plan.write_text(text)
    with pytest.raises(UsageError, match="is no JSON"):
        read_plan(plan)


@pytest.mark.parametrize("form", ["table", "md", "csv", "html"])
def test_f06_half_a_surrogate_in_a_result_is_shown(tmp_path, form):
    value = result()
    value["recipe"]["requested"] = "\ud800\x1b[2J"
    path = write(tmp_path, "a.json", value)
    FORMATS[form](compare(path, path)).encode()


@pytest.mark.parametrize(
    "broken", [{"gpu": 1}, {"results": None, "speedup": []}, {"configuration": {}}, {"recipe": {"text": {}}}]
)
def test_f07_a_cell_that_lacks_a_figure_is_told(tmp_path, broken):
    found = Sweep.load(write(tmp_path, "s.jsonl", [{"sweep": HEAD}, CELL | result() | broken]))
    for form in (found.to_csv, found.to_markdown, found._repr_html_):
        with pytest.raises(UsageError, match=r"the cell seq=1024: the result"):
            form()


@pytest.mark.parametrize("broken", [{"axes": []}, {"axes": {"seq": 1}}, {"axes": {"x": []}}, {"cells": "2"}, {"cells": None}])
def test_f08_a_damaged_header_is_refused(tmp_path, broken):
    with pytest.raises(UsageError, match=r"s\.jsonl:1 is a damaged header"):
        Sweep.load(write(tmp_path, "s.jsonl", [{"sweep": HEAD | broken}, CELL]))


def test_f09_a_number_that_is_none_spoils_no_export(tmp_path):
    path = write(tmp_path, "s.jsonl", [{"sweep": HEAD}])
    with path.open("a") as file:
        file.write('{"cell": {"seq": 1}, "status": "failed", "reason": 1e999}\n')
    with pytest.raises(UsageError, match=r"s.jsonl:2"):
        Sweep.load(path)


def test_f10_f11_f12_what_nests_too_deep_is_refused(tmp_path):
    with pytest.raises(UsageError, match="deep"):
        ModelCalibration.loads(DEEP)
    from hashlib import sha256

    from elastickv.backends.cuda.compiler import _read

    body = DEEP.encode() + b"\n"
    kept = tmp_path / "k.kernel"
    kept.write_bytes(sha256(body).digest() + body)
    assert _read(kept) is None
    pytest.importorskip("torch")
    from elastickv.transformers.config import recipes_in

    path = tmp_path / "recipes"
    path.write_text(DEEP)
    with pytest.raises(UsageError, match="deep"):
        recipes_in(path)


@pytest.mark.skipif(os.name == "nt", reason="names of files are text there")
def test_f13_a_name_that_is_no_text_may_be_written_to(tmp_path):
    from pathlib import Path

    check_writable(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.json")))


def test_f16_figures_of_any_size_make_a_comparison_of_numbers(tmp_path):
    paths = []
    for name, mean in (("a.json", 1e-320), ("b.json", 1e-29), ("c.json", 1e29)):
        value = json.loads(json.dumps(ORIGINAL))
        value["results"] |= {"attention_time_ms": mean, "attention_time_std": 1e30}
        paths.append(write(tmp_path, name, value))
    with pytest.raises(UsageError, match="attention_time_ms"):
        compare(paths[0], paths[1])
    text = compare(paths[1], paths[2]).to_json()
    assert not {"Infinity", "NaN"} & set(text.split())
    interval = ratio_of_summaries(SummaryStats(1.0, 1e30, 2), SummaryStats(1.0, 1e30, 2))
    assert 0 < interval.low < 1 < interval.high < math.inf


@pytest.mark.parametrize("text", ["1-1" + "0" * 400, "0.0-1*1e5", "1" + "0" * 400, "nan", "inf", "0." + "0" * 300 + "1-1*2"])
@pytest.mark.parametrize("name", ["seq", "compress"])
def test_r05_ranges_and_numbers_that_no_arithmetic_holds(name, text):
    with pytest.raises(UsageError):
        values(name, text)
    with pytest.raises(UsageError):
        SweepPlan.of({name: 10**400})


@pytest.mark.parametrize("version", ["²", "9" * 5000, "", "x.y"])
def test_r06_a_version_that_is_none_is_another(tmp_path, version):
    value = {"benchmark_type": "elastic_kv_cache", "schema_version": version}
    with pytest.raises(UsageError, match="schema"):
        read_result_set(write(tmp_path, "a.json", value), "A")


def test_r03_a_prompt_that_is_no_utf8_is_refused(monkeypatch):
    from elastickv.cli.run import _prompt

    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"\xff\xfe"), "utf-8"))
    with pytest.raises(UsageError, match="standard input is not UTF-8"):
        _prompt(None, None)


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_r04_a_link_in_a_circle_is_no_output(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match="loop"):
        check_writable(tmp_path / "loop")


@pytest.mark.parametrize("text", ["speedup>=" + "9" * 400, "cv<=0." + "1" * 400])
def test_r10_a_bound_is_a_number(text):
    with pytest.raises(UsageError):
        Gate.parse(text)
    with pytest.raises(UsageError):
        Tolerance.parse("ppl=" + "9" * 400)


@pytest.mark.parametrize("shape", [[10**18, 64], [10**19] * 4, [1] * 5000, [2**63, 2**63, 2**63]])
def test_r11_a_size_that_a_header_claims_is_compared_and_not_allocated(tmp_path, shape):
    entry = {"dtype": "F16", "shape": shape, "data_offsets": [0, 8192]}
    header = json.dumps({"q": entry, "k": entry, "v": entry}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8192))
    with pytest.raises(UsageError, match="corrupt"):
        load_sample(path)


@pytest.fixture(scope="module")
def saved():
    pytest.importorskip("torch")
    from tests.fuzz.targets import _saved

    return _saved()


class TestSavedCaches:
    """What the record and the arrays of a saved cache claim is checked before anything is allocated or a kernel trusts it."""

    @staticmethod
    def load(saved, folder, change):
        import copy

        from safetensors.numpy import save_file

        from elastickv.transformers import ElasticCache

        model, kept = saved
        record, arrays = copy.deepcopy(kept[0])
        change(record, arrays)
        save_file(arrays, folder / "c", {"elastickv": json.dumps(record)})
        return ElasticCache.load(folder / "c", model, capture=False)

    def test_what_was_saved_is_loaded(self, saved, tmp_path):
        assert self.load(saved, tmp_path, lambda record, arrays: None).get_seq_length() == 201

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("capacity", 10**18),
            ("capacity", 1),
            ("capacity", -1),
            ("capacity", "64"),
            ("phase", 0.5),
            ("phase", 4),
            ("dtype", "x"),
            ("shape", [1, 2, 1, 128]),
            ("shape", [10**6, 2, 1, 64]),
            ("head_dim", 32),
            ("recipe", "int8"),
            ("recipe", "pages"),
        ],
    )
    def test_r09_a_claim_that_the_arrays_do_not_bear_out(self, saved, tmp_path, name, value):
        with pytest.raises(UsageError):
            self.load(saved, tmp_path, lambda record, arrays: record["layers"][0]["store"].update({name: value}))

    def test_f17_tokens_without_a_budget(self, saved, tmp_path):
        with pytest.raises(UsageError, match="budget"):
            self.load(saved, tmp_path, lambda record, arrays: record.update(budget=None))

    @pytest.mark.parametrize("length", [10**18, 202, -1, "x"])
    def test_r09_a_length_that_is_not_its_places(self, saved, tmp_path, length):
        with pytest.raises(UsageError):
            self.load(saved, tmp_path, lambda record, arrays: record["layers"][0].update(length=length))

    @pytest.mark.parametrize("word", range(9))
    @pytest.mark.parametrize("value", [-5, 10**9, 2**62])
    def test_r02_f15_a_state_that_no_decode_leaves(self, saved, tmp_path, word, value):
        """Length, step, pages listed and so on: kernels address memory by them."""
        from elastickv.backends.cpu.layout import State

        def change(record, arrays):
            arrays["0.state"].view("<i8")[..., word] = value

        harmless = word in (State.BAD_POSITION, State.BEYOND_POSITION)
        try:
            cache = self.load(saved, tmp_path, change)
        except UsageError:
            return
        assert harmless, f"{State(word).name} = {value} was let in"
        assert cache.get_seq_length() == 201

    def test_r02_a_list_that_names_a_page_beyond_the_cache(self, saved, tmp_path):
        def change(record, arrays):
            arrays["0.lists"].view("<i4")[..., 0] = 1 << 28

        with pytest.raises(UsageError, match="lists"):
            self.load(saved, tmp_path, change)

    @pytest.mark.parametrize("share", [-1.0, 0.0, 2.0, math.nan, 1e300])
    def test_r02_a_share_that_is_none(self, saved, tmp_path, share):
        def change(record, arrays):
            arrays["0.fractions"].view("<f8")[:] = share

        with pytest.raises(UsageError, match="shares"):
            self.load(saved, tmp_path, change)

    def test_r01_a_pipe_is_not_waited_for(self, saved, tmp_path):
        from elastickv.transformers import ElasticCache

        if not hasattr(os, "mkfifo"):
            pytest.skip("this system has no pipes with names")
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(UsageError, match="not a regular file"):
            ElasticCache.load(tmp_path / "pipe", saved[0])


@pytest.mark.parametrize("weights", [b"", b"\xff" * 64, struct.pack("<Q", 1 << 62) + b"{}", struct.pack("<Q", 2) + b"{}"])
def test_r08_weights_that_are_damaged_are_told_in_one_line(tmp_path, weights):
    pytest.importorskip("torch")
    from elastickv.transformers.model_loading import load_model
    from tests.helpers.tiny_models import tiny_llama

    tiny_llama(layers=1).model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("counts", [(10**18, 0), (0, 10**18), (3, 5)])
def test_r08_a_gguf_header_that_claims_more_than_there_is(tmp_path, counts):
    pytest.importorskip("gguf")
    from elastickv.transformers.model_loading import load_model

    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + bytes(64))
    with pytest.raises(UsageError, match="damaged or cut off"):
        load_model(str(path))
