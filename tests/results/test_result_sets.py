"""What is read from files: every program's results, cut-off sweeps, and one clear line for what cannot be read."""

import copy
import itertools
import json
from dataclasses import replace

import pytest

from elastickv import compare
from elastickv.benchmark import Options, Result, run
from elastickv.benchmark.from_dict import LARGEST, LEAST, LEAST_TIME, LONGEST_TIME
from elastickv.benchmark.stats.intervals import SummaryStats, ratio_interval, ratio_of_summaries
from elastickv.errors import UsageError
from elastickv.results.compare.matching import comparability_warnings, match
from elastickv.results.compare.result_sets import read_result_set
from elastickv.results.formats import FORMATS
from elastickv.sweeps.sweep_result import Sweep
from tests.helpers.reference_backend import ReferenceBackend, measure_with
from tests.helpers.results import COMMITTED, GGUF, ORIGINAL, result, write


def test_a_file_a_folder_and_values_in_memory_give_the_same_runs(tmp_path):
    made = result()
    (tmp_path / "inner").mkdir()
    path = write(tmp_path / "inner", "one.json", made)
    runs = [read_result_set(given, "A").runs for given in (path, str(path), tmp_path, made, [made], [path])]
    assert [len(each) for each in runs] == [1] * 6
    assert len({each[0].cell for each in runs}) == 1
    assert {each[0].figures["step"].mean_ms for each in runs} == {made["results"]["attention_time_ms"]}
    assert runs[0][0].source == str(path)


def test_a_copy_of_a_run_is_no_repetition(tmp_path):
    one, other = result(), result()
    other["samples"]["elastic"] = other["samples"]["elastic"][::-1]
    write(tmp_path, "a.json", one)
    write(tmp_path, "b.jsonl", [one, other])
    side = read_result_set(tmp_path, "A")
    assert [run.source for run in side.runs] == [str(tmp_path / "a.json"), f"{tmp_path / 'b.jsonl'}:2"]
    assert side.notes == [f"{tmp_path / 'b.jsonl'}:1 is the run of {tmp_path / 'a.json'} once more, and counts once"]


def test_anything_that_gives_its_dictionary_is_a_result():
    class Measured:
        def as_dict(self):
            return result()

    assert hasattr(Result, "as_dict")
    assert read_result_set(Measured(), "A").runs[0].source == "A"
    with pytest.raises(UsageError, match="B is a int"):
        read_result_set(3, "B")


def test_every_committed_result_is_read():
    held = [p for p in COMMITTED.rglob("*.json") if '"benchmark_type"' in p.read_text(encoding="utf-8")[:200]]
    side = read_result_set(COMMITTED, "A")
    models = [run for run in side.runs if run.protocol["program"] == "elastickv bench --model"]
    assert len(side.runs) - len(models) == len(held) > 20
    assert models


def test_a_byte_order_mark_does_no_harm(tmp_path):
    path = tmp_path / "windows.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(result()).encode())
    assert len(read_result_set(path, "A").runs) == 1


def sweep(*cells):
    return [{"sweep": {"cells": len(cells)}}, *cells]


def cell(seq, status="ok", **more):
    return {"cell": {"seq": seq}, "status": status, **more}


def test_a_sweep_is_its_cells(tmp_path):
    path = write(tmp_path, "s.jsonl", sweep(cell(1024, **result()), cell(2048, **result(seq=2048))))
    side = read_result_set(path, "A")
    assert [dict(run.cell.workload)["seq"] for run in side.runs] == [1024, 2048]
    assert [run.source for run in side.runs] == [f"{path}:2", f"{path}:3"]
    assert not side.notes


def test_a_whole_sweep_in_one_object_is_its_cells(tmp_path):
    cells = [cell(1024, **result()), cell(2048, "failed", reason="out of luck")]
    path = write(tmp_path, "s.json", {"sweep": {"cells": 2}, "cells": cells})
    for given in (path, {"sweep": {}, "cells": cells}, Sweep({}, cells)):
        side = read_result_set(given, "A")
        assert len(side.runs) == 1
        assert side.not_measured == {"seq=2048": "out of luck"}


def test_a_cell_without_a_result_is_named_with_its_reason(tmp_path):
    refused = cell(999999, "refused", reason="needs 3.1 GiB")
    side = read_result_set(write(tmp_path, "s.jsonl", sweep(cell(1024, **result()), refused)), "A")
    assert side.not_measured == {"seq=999999": "needs 3.1 GiB"}


def test_the_line_that_a_killed_sweep_was_writing_is_left_out_and_named(tmp_path):
    path = write(tmp_path, "s.jsonl", sweep(cell(1024, **result()), cell(2048, **result(seq=2048))))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    side = read_result_set(path, "A")
    assert len(side.runs) == 1
    assert side.notes == [f"{path}:3 was cut off while it was written, and is left out"]


def test_a_broken_line_in_the_middle_is_named_and_the_others_are_read(tmp_path):
    path = write(tmp_path, "s.jsonl", sweep(cell(1024, **result()), cell(2048, **result(seq=2048))))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:-50] + "\n" + lines[2])
    side = read_result_set(path, "A")
    assert [run.source for run in side.runs] == [f"{path}:3"]
    (reason,) = side.refusals
    assert "s.jsonl:2 is no JSON" in reason
    path.write_text(lines[1][:-50] + "\n" + lines[2])
    with pytest.raises(UsageError, match=r"s\.jsonl:1 is no JSON"):
        read_result_set(path, "A")


def test_a_line_ends_at_its_newline_and_at_nothing_else(tmp_path):
    named = result()
    named["environment"] = {"cpu": "a\u2028b\x85c"}
    text = json.dumps(named, ensure_ascii=False)
    (tmp_path / "s.jsonl").write_bytes(f"{text}\r\n{json.dumps(result(seq=2048))}\r\n".encode())
    assert len(read_result_set(tmp_path / "s.jsonl", "A").runs) == 2


def test_a_foreign_file_beside_a_result_is_left_out_and_named(tmp_path):
    write(tmp_path, "a.json", result())
    write(tmp_path, "package.json", {"name": "a package"})
    side = read_result_set(tmp_path, "A")
    assert len(side.runs) == 1
    (reason,) = side.refusals
    assert "package.json holds no results" in reason
    comparison = compare(tmp_path, tmp_path / "a.json")
    assert comparison.exit_code(None) == 2
    assert any("package.json" in warning for warning in comparison.warnings)


def test_a_name_that_no_file_can_have_is_refused_with_what_is_accepted():
    with pytest.raises(UsageError, match=r"cannot be read: .*; give a result of `elastickv bench`"):
        read_result_set("n" * 300 + ".json", "A")
    with pytest.raises(UsageError, match=r"b\.json .*give a result of `elastickv bench`"):
        read_result_set("a\0b.json", "A")


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("empty.json", b"", "is empty"),
        ("blank.jsonl", b"\n\n", "is empty"),
        ("cut.json", b'{"benchmark_type": "elastic_kv_cache", "build": {', "line 1, column"),
        ("cut.jsonl", b'{"sweep": {}', "cut.jsonl:1 is no JSON"),
        ("binary.json", b"\x80\x02\x7d\x71", "is not UTF-8"),
        ("nan.json", b'{"a": NaN}', "NaN"),
        ("deep.json", b"[" * 100_000, "nests too deep"),
        ("list.json", b"[1, 2]", "holds no result"),
        ("other.json", b'{"kind": "something"}', "holds no result"),
        ("empty_sweep.jsonl", b'{"sweep": {}}\n', "holds no result"),
        ("none_fit.jsonl", b'{"sweep": {}}\n{"cell": {"seq": 1}, "status": "refused"}\n', "1 cells, none of them measured"),
    ],
)
def test_what_is_no_result_is_one_line_that_names_the_file(tmp_path, name, content, named):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError) as refused:
        read_result_set(path, "A")
    assert name in str(refused.value)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


def test_missing_and_empty_places(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        read_result_set(tmp_path / "no.json", "A")
    with pytest.raises(UsageError, match=r"holds no \.json"):
        read_result_set(tmp_path, "A")


def test_a_corrupt_file_in_a_folder_is_named_and_the_others_are_read(tmp_path):
    write(tmp_path, "good.json", result())
    (tmp_path / "bad.json").write_text('{"benchmark_type')
    side = read_result_set(tmp_path, "A")
    assert [run.source for run in side.runs] == [str(tmp_path / "good.json")]
    (reason,) = side.refusals
    assert "bad.json is no JSON" in reason
    (tmp_path / "good.json").unlink()
    with pytest.raises(UsageError, match=r"bad\.json"):
        read_result_set(tmp_path, "A")


DELETED = [
    ("samples",), ("samples", "elastic"), ("configuration", "seq_len"), ("gpu", "name"), ("recipe", "text"), ("build",),
    ("results", "attention_time_ms"), ("baseline", "name"), ("contenders",), ("complete",), ("pairing",),
    ("fidelity", "sample", "recipe_error", "p95"), ("inference_cycle", "raw_token_latencies_ms"),
]  # fmt: skip


@pytest.mark.parametrize("path", DELETED, ids=".".join)
def test_a_result_that_lacks_something_says_what(path):
    made = result(cycle=True)
    place = made
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    with pytest.raises(UsageError, match=path[-1]):
        read_result_set(made, "A")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("samples", "elastic"), [0.1, -0.1]), (("samples", "elastic"), [0.1, "0.1"]), (("samples", "elastic"), 3),
        (("samples", "elastic"), [0.1]), (("results", "attention_time_ms"), "fast"), (("results", "attention_time_ms"), -1),
        (("samples", "baseline"), [True, 1.0]), (("build",), 3), (("contenders",), None), (("samples",), []),
        (("fidelity", "sample", "context"), 3), (("gpu",), "H100"), (("inference_cycle", "layers"), 0),
        (("configuration", "seq_len"), 0.5),
        (("inference_cycle", "raw_token_latencies_ms", "elastic"), [3]), (("recipe", "requested"), ["int8"]),
    ],
)  # fmt: skip
def test_a_result_with_something_else_in_a_place_is_refused(path, value):
    made = result(cycle=True)
    place = made
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(UsageError):
        read_result_set(made, "A")


def places(value, path=()):
    """Yield the path of everything in a result but the single items of lists of numbers."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, item in items:
        if isinstance(value, dict) or isinstance(item, (dict, list)):
            yield from places(item, (*path, key))


WHOLE = {
    "elastickv": result(cycle=True),
    "original": ORIGINAL | {"inference_cycle": {"decode_tokens": 64, "baseline_total_ms": 8.0, "elastic_total_ms": 4.0}},
    "gguf": GGUF,
    "model": json.loads((COMMITTED / "cpu" / "model-8000.json").read_text(encoding="utf-8")),
}


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("strange", [None, -1, 0, "x", True, [], {}, [1], [[1, 2]], {"name": []}, 1e400], ids=str)
def test_whatever_stands_in_any_place_is_read_or_refused(kind, strange):
    whole, refusals = WHOLE[kind], []
    for path in list(places(whole)):
        made = copy.deepcopy(whole)
        place = made
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = strange
        try:
            a, b = read_result_set(made, "A"), read_result_set(whole, "B")
            list(comparability_warnings(match(a, b, allow_different_device=True)))
        except UsageError as refused:
            refusals.append(str(refused))
    assert refusals
    assert not any("\n" in refusal for refusal in refusals)


@pytest.mark.parametrize(("schema", "todo"), [("0.9", "measure again"), ("2.0", "update elastickv"), ("next", "1.0")])
def test_other_schemas_are_refused(schema, todo):
    with pytest.raises(UsageError, match=todo):
        read_result_set(result() | {"schema_version": schema}, "A")


def test_a_later_minor_schema_is_read():
    assert read_result_set(result() | {"schema_version": "1.7", "something_new": {}}, "A").runs


def test_mixed_units_are_refused():
    made = result()
    made["samples"]["elastic"] = [1e3 * ms for ms in made["samples"]["elastic"]]
    with pytest.raises(UsageError, match="mixes units"):
        read_result_set(made, "A")


@pytest.mark.parametrize("path", [("results",), ("results", "attention_time_std"), ("configuration", "reps"), ("gpu", "name")])
def test_an_original_result_that_lacks_something_is_refused(path):
    made = copy.deepcopy(ORIGINAL)
    place = made
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    with pytest.raises(UsageError):
        read_result_set(made, "A")


def test_a_models_result_of_another_version_is_refused():
    made = json.loads((COMMITTED / "cpu" / "model-8000.json").read_text())
    tokens_per_s = next(c["tokens_per_s"] for c in made["caches"] if c["cache"] == "elastic")
    assert read_result_set(made, "A").runs[0].figures["token"].mean_ms == pytest.approx(1e3 / tokens_per_s, rel=1e-4)
    with pytest.raises(UsageError, match="version 2"):
        read_result_set(made | {"version": 2}, "A")


def test_each_kv_cache_type_of_a_gguf_baseline_is_judged_against_the_first():
    [run] = read_result_set(GGUF, "A").runs
    assert run.figures["token, q8_0"].elastic == pytest.approx((10, 12.5, 11.25))
    assert run.figures["token, q8_0"].dense == {"f16": run.figures["token, f16"].elastic}
    assert run.figures["prompt token, f16"].elastic[0] == pytest.approx(0.2e3 / 256) and not run.figures["token, f16"].dense
    assert run.fidelity.measured_on == "KL of q8_0 to f16, 8 tokens of morris.txt after 256"
    with pytest.raises(UsageError, match="version 2"):
        read_result_set(GGUF | {"version": 2}, "A")


def test_a_result_just_measured_is_read_as_its_file_is(tmp_path, monkeypatch):
    measure_with(monkeypatch, ReferenceBackend())
    options = {"seq": 340, "heads": 2, "dim": 64, "reps": 4, "warmup": 1, "inner_loops": 2, "cache": "hot", "paired": True}
    measured = run(Options(**options, compress=1.3, inference=True, decode_tokens=4, layers=2))
    [in_memory] = read_result_set(measured, "A").runs
    path = tmp_path / "result.json"
    path.write_text(FORMATS["json"](measured), encoding="utf-8")
    [from_file] = read_result_set(path, "A").runs
    assert replace(from_file, source="A") == in_memory
    assert set(in_memory.figures) == {"step", "cycle of 4"}
    assert in_memory.figures["step"].dense
    assert in_memory.fidelity is not None


@pytest.mark.parametrize(("paired", "bounds"), [(True, 2), (False, 2), (True, 3)])
def test_the_bounds_of_times_that_tell_nothing_are_figures_to_a_reader(paired, bounds):
    shortest, longest = LEAST_TIME, LONGEST_TIME
    for numerator in itertools.product((shortest, longest), repeat=bounds):
        for denominator in itertools.product((shortest, 1.0, longest), repeat=bounds):
            found = ratio_interval(numerator, denominator, paired=paired)
            assert LEAST <= found.low <= found.estimate <= found.high <= LARGEST
    spread = SummaryStats(shortest, longest, 2)
    found = ratio_of_summaries(spread, SummaryStats(longest, 0.0, 2))
    assert LEAST <= found.low < found.estimate < found.high <= LARGEST
