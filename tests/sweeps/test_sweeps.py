"""Sweeps: what their axes take, what their files survive, what they refuse."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import elastickv
from elastickv.benchmark.options import AXES, SETTINGS
from elastickv.errors import UsageError
from elastickv.results.compare.result_sets import read_result_set
from elastickv.sweeps import scheduler
from elastickv.sweeps.axes import values
from elastickv.sweeps.journal import Journal, read
from elastickv.sweeps.plan import SweepPlan, key, read_plan
from elastickv.sweeps.sweep import sweep
from elastickv.sweeps.sweep_result import Sweep
from tests.helpers.tiny_models import tiny_gguf
from tests.sweeps.killed import PLAN

HERE = Path(__file__).parent
SMALL = {"seq": [512, 1024], "compress": 1.2, "heads": 2, "backend": "cpu"}


@pytest.fixture
def fake(monkeypatch):
    source = str(HERE.parents[1] / "src")
    monkeypatch.setenv("PYTHONPATH", source)
    monkeypatch.setattr(scheduler, "PROGRAM", (sys.executable, str(HERE / "fake_worker.py")))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("seq", "1024,4096", [1024, 4096]),
        ("compress", "1,2-8*2", [1, 2, 4, 8]),
        ("batch", "1-64*4", [1, 4, 16, 64]),
        ("batch", "1-9+4,5", [1, 5, 9]),
        ("compress", "1-2+0.25", [1, 1.25, 1.5, 1.75, 2]),
        ("recipe", "auto,int8,stride=2,int4", ["auto", "int8,stride=2", "int4"]),
        ("recipe", "int4,pages;int8", ["int4,pages", "int8"]),
        ("recipe", ["int4,pages"], ["int4,pages"]),
    ],
)
def test_an_axis_takes_lists_and_ranges(name, text, expected):
    assert values(name, text) == expected


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"seq": "abc"}, "`seq`=abc"),
        ({"seq": "8-2"}, "8-2"),
        ({"batch": "1-4*1"}, "1-4"),
        ({"batch": "1-99999999"}, "larger step"),
        ({"seq": ""}, "`seq`"),
        ({"seq": []}, "`seq` is empty"),
        ({"seq": [True]}, "whole number"),
        ({"seq": [512, 0]}, "`seq`=0"),
        ({"dtype": "bf16,int8"}, "`dtype`=int8"),
        ({"seqs": 5}, "seqs is unknown"),
        ({"reps": 1}, "`reps`=1"),
        ({"cells": [{"reps": 5}]}, "reps in cells"),
        ({"cells": []}, "not empty"),
    ],
)
def test_a_bad_plan_is_refused_in_one_line(given, named):
    with pytest.raises(UsageError, match=named.replace("*", r"\*")) as error:
        SweepPlan.of({"compress": 1.2} | given)
    assert "\n" not in str(error.value)


def test_the_order_of_the_axes_which_the_hash_of_a_plan_depends_on_stays():
    assert AXES == (
        "seq", "batch", "compress", "recipe", "heads", "kv_heads", "dim", "dtype", "cache", "sinks", "window", "anchor_every",
    )  # fmt: skip
    assert SweepPlan.of({"seq": [512, 1024], "compress": [1.2, 1.5], "heads": 2, "backend": "cpu"}).hash == "1dde75d3c018b74e"


def test_cells_of_a_plan_are_a_union_of_products_in_an_order_of_the_seed(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(
        'compress = 1.2\nheads = 4\n[[cells]]\nseq = [512, 1024]\nbatch = "1-2"\n[[cells]]\nseq = 512\nbatch = [2, 8]\n'
    )
    plan = SweepPlan.of(read_plan(path))
    assert {(cell["seq"], cell["batch"]) for cell in plan.cells} == {(512, 1), (512, 2), (1024, 1), (1024, 2), (512, 8)}
    assert SweepPlan.of(read_plan(path)) == plan
    other = SweepPlan.of(read_plan(path) | {"seed": 5})
    assert other.cells != plan.cells and other.hash != plan.hash


@pytest.mark.parametrize("text", ["seq = ", "", "sequence = 5"])
def test_a_bad_plan_file_is_named(tmp_path, text):
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"plan\.toml"):
        read_plan(path)


@pytest.mark.fault("signals")
def test_killed_ten_times_and_resumed_gives_the_cells_of_an_uninterrupted_run(tmp_path):
    path, randomly = tmp_path / "sweep.jsonl", random.Random(7)
    command = [sys.executable, str(HERE / "killed.py"), str(path)]
    source = str(HERE.parents[1] / "src")
    environment = os.environ | {"PYTHONPATH": source}
    seen: list[bytes] = []
    for kill in range(10):
        process = subprocess.Popen(command, env=environment)
        least = path.stat().st_size if path.exists() else 0
        # Wait for something new, so that every kill falls into the measuring; it may fall anywhere in it.
        while process.poll() is None and (path.stat().st_size if path.exists() else 0) <= least:
            time.sleep(0.002)
        time.sleep(randomly.uniform(0, 0.06))
        assert process.poll() is None, f"done before kill {kill}"
        process.send_signal(signal.SIGKILL)
        process.wait()
        whole = path.read_bytes().split(b"\n")[:-1]
        assert whole[: len(seen)] == seen, "what was in the file stays"
        seen = whole
        if kill % 3 == 0:
            # A kill inside the write call itself can't be timed: it leaves the beginning of a line.
            with path.open("ab") as file:
                file.write(b'{"cell": {"seq": 10')
    subprocess.run(command, env=environment, check=True)
    _, records = read(path)
    found = [key(record["cell"]) for record in records]
    assert len(found) == len(set(found))
    assert set(found) == {key(cell) for cell in SweepPlan.of(PLAN).cells}
    assert {record["status"] for record in records} == {"ok"}


@pytest.mark.fault("out of memory")
def test_a_cell_that_does_not_fit_or_kills_its_process_stops_no_other(tmp_path, fake):
    found = sweep(output=tmp_path / "s.jsonl", dim=[64, 128, 256], **SMALL)
    status = {dim: {(c["status"], c["reason"]) for c in found.cells if c["cell"]["dim"] == dim} for dim in (64, 128, 256)}
    assert status[64] == {("ok", None)}
    assert status[128] == {("does not fit", "`seq` 9 needs 9 GiB")}
    ((kind, reason),) = status[256]
    assert kind == "failed" and "killed" in reason
    assert found.complete


def test_values_that_do_not_go_together_are_cells_with_a_reason(fake, tmp_path):
    plan = SweepPlan.of({"seq": [256, 4096], "compress": [1, 4], "heads": 2})
    assert len(plan.refused) == 1 and "256" in next(iter(plan.refused))
    with pytest.raises(UsageError, match="context"):
        SweepPlan.of({"seq": 256, "compress": [1, 4], "heads": 2})


def test_several_processes_share_the_cells(tmp_path, fake):
    plan = SweepPlan.of(PLAN)
    from elastickv.sweeps.sweep import _Silent

    with Journal(tmp_path / "s.jsonl", plan, resume=False) as journal:
        assert scheduler.measure(plan, journal, _Silent(), devices=[None, None, None])
    assert {key(record["cell"]) for record in read(tmp_path / "s.jsonl")[1]} == {key(cell) for cell in plan.cells}


def test_a_time_limit_leaves_the_rest_to_resume(tmp_path, fake):
    path = tmp_path / "s.jsonl"
    assert not sweep(output=path, time_limit_s=0.01, **SMALL).complete
    assert sweep(output=path, resume=True, **SMALL).complete


def test_a_sweep_that_never_measured_does_not_occupy_its_file(tmp_path, fake):
    path = tmp_path / "s.jsonl"
    Journal(path, SweepPlan.of(SMALL | {"heads": 4}), resume=False).__exit__(None, None, None)
    assert sweep(output=path, **SMALL).complete
    path.write_text("notes\n")
    with pytest.raises(UsageError, match="no JSON object"):
        sweep(output=path, **SMALL)
    assert path.read_text() == "notes\n"


def test_files_of_others_are_left_alone(tmp_path, fake):
    path = tmp_path / "s.jsonl"
    sweep(output=path, **SMALL)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="`resume=True` continues it"):
        sweep(output=path, **SMALL)
    with pytest.raises(UsageError, match="another plan"):
        sweep(output=path, resume=True, **SMALL | {"heads": 4})
    with Journal(path, SweepPlan.of(SMALL), resume=True), pytest.raises(UsageError, match="another sweep"):
        sweep(output=path, resume=True, **SMALL)
    assert path.read_bytes() == before
    path.write_bytes(before.replace(b'{"cell"', b'{"ce', 1))
    with pytest.raises(UsageError, match=r"s\.jsonl:2"):
        sweep(output=path, resume=True, **SMALL)
    path.write_text('{"benchmark_type": 1}\n')
    with pytest.raises(UsageError, match="no header"):
        Sweep.load(path)


def test_the_command_measures_real_cells_and_its_options_are_those_of_bench(tmp_path):
    from click.testing import CliRunner

    from elastickv.benchmark.result import SCHEMA_VERSION
    from elastickv.cli import sweep as cli

    assert {*AXES, *SETTINGS} <= {parameter.name for parameter in cli.command.params}
    path, table = tmp_path / "s.jsonl", tmp_path / "s.csv"
    shape = ["--seq=300", "--heads=2", "--cache=hot", "--backend=cpu", "--compress=1.3", "--recipe=auto,int8"]
    done = CliRunner().invoke(
        cli.command, [*shape, "--reps=2", "--warmup=0", "--inner_loops=1", "-o", str(path), "--export", str(table)],
        standalone_mode=False, catch_exceptions=False,
    )  # fmt: skip
    assert done.return_value == 0
    found = Sweep.load(path)
    assert {cell["cell"]["recipe"] for cell in found.cells} == {"auto", "int8"}
    assert {cell["schema_version"] for cell in found.cells} == {SCHEMA_VERSION}
    assert found.header["settings"]["warmup"] == 0
    assert len(table.read_text().splitlines()) == 3
    assert "<td>int8</td>" in found._repr_html_()
    assert len(json.loads(found.to_json())["cells"]) == 2
    found.save(tmp_path / "s.json")
    assert elastickv.load(path) == elastickv.load(tmp_path / "s.json") == found
    assert elastickv.sweep is sweep


def test_what_is_not_installed_is_named(monkeypatch, tmp_path):
    from elastickv.sweeps import sweep_result

    monkeypatch.setattr(sweep_result, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install pyarrow"):
        sweep_result.check_export(tmp_path / "s.parquet")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match="pip install pandas"):
        Sweep({"cells": 0}, []).to_pandas()


def test_baselines_are_cells_of_a_sweep(tmp_path):
    pytest.importorskip("xllamacpp")
    model = str(tiny_gguf(tmp_path / "tiny.gguf"))
    path, few = tmp_path / "s.jsonl", {"backend": "cpu", "reps": 3, "decode_tokens": 1}
    found = sweep(output=path, baseline="transformers,gguf", model=[model, "nope.gguf"], **few)
    assert found.complete and len(found.cells) == 4
    rows = {(row["program"], row["model"]): row for row in found.rows()}
    assert rows["gguf", model]["baseline"] == "f16" and rows["gguf", model]["baseline_ms"] > 0
    assert rows["transformers", model]["speedup_low"] <= rows["transformers", model]["speedup"]
    assert rows["transformers", model]["elastic_ms"] > 0 and rows["transformers", model]["ratio_read"] > 1
    assert {rows[program, "nope.gguf"]["status"] for program in ("transformers", "gguf")} == {"failed"}
    assert "does not exist" in rows["gguf", "nope.gguf"]["reason"]
    assert len(read_result_set(path, "A").runs) == 2 and len(read_result_set(path, "A").not_measured) == 2
    again = sweep(output=path, resume=True, baseline="transformers,gguf", model=[model, "nope.gguf"], **few)
    assert again.cells == found.cells
    assert found.to_csv() and found.to_markdown() and "tiny.gguf" in found._repr_html_()


def test_baselines_alone_are_the_whole_plan():
    plan = SweepPlan.of({"baseline": ["gguf"], "model": "a.gguf,b.gguf", "seed": 3, "backend": "cpu"})
    assert sorted(cell["model"] for cell in plan.cells) == ["a.gguf", "b.gguf"]
    request = plan.request(plan.cells[0], None, ("elastickv", "sweep"))
    assert request == {"baseline": plan.cells[0] | {"seed": 3}, "command": ["elastickv", "sweep"]}
    with_seq = SweepPlan.of(
        {"baseline": "transformers", "model": "m", "seq": 512, "compress": 1.2, "heads": 2, "backend": "cpu"}
    )
    [cell] = [cell for cell in with_seq.cells if "program" in cell]
    assert len(with_seq.cells) == 2 and with_seq.request(cell, None, ())["baseline"]["device"] == "cpu"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"baseline": "gguf"}, "without `model`"),
        ({"model": "a.gguf"}, "without `baseline`"),
        ({"baseline": "onnx", "model": "a"}, "`baseline` onnx is unknown: choose transformers, gguf"),
        ({"baseline": "", "model": "a"}, "no list of names"),
        ({"baseline": 3, "model": "a"}, "no list of names"),
    ],
)
def test_a_baseline_that_is_none_is_refused(given, said):
    with pytest.raises(UsageError, match=said):
        SweepPlan.of(given)
