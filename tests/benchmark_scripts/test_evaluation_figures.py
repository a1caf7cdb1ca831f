"""The tables of the docs say what evaluations hold: tasks, long texts, pass keys and times. The results here are made up."""

import importlib
import json
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
FIGURE = {"mean": 0.5, "low": 0.25, "high": 0.75}


@pytest.fixture(scope="module")
def figures():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield {name: importlib.import_module(name) for name in ("task_figures", "evaluation_figures", "quality_figures")}


@pytest.fixture
def write(figures, tmp_path, monkeypatch):
    """Return a function that writes a result file under the name that the figures are read from."""
    for name in ("task_figures", "evaluation_figures"):
        monkeypatch.setattr(figures[name], "RESULTS", tmp_path)

    def write_json(name, value):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(value), encoding="utf-8")

    return write_json


def evaluation(**parts):
    environment = {"cpu": "a CPU", "torch": "2", "transformers": "5", "date_utc": "2026-01-01", "versions": {}}
    model = {"name": "M.Q4_1.gguf", "fingerprint": "f", "dtype": "bf16", "device": "cuda:0", "device_name": "a GPU"}
    model |= {"layers": 2, "query_heads": 4, "kv_heads": 2, "head_dim": 64}
    return {
        "kind": "elastickv-fidelity", "version": 1, "environment": environment, "model": model, "texts": ["a", "b"],
        "calibration": None, "options": {}, "skipped": [], "rows": [], "needle": [], "suggestion": None, "seconds": 1.0,
        **parts,
    }  # fmt: skip


def answered(cache, *scores, full=None):
    full = full or scores
    difference = 100 * (sum(scores) - sum(full)) / len(scores)
    return {
        "cache": cache,
        "score_percent": FIGURE | {"mean": 100 * sum(scores) / len(scores)},
        "difference_points": {"mean": difference, "low": difference - 1, "high": difference + 1},
        "worse": 0,
        "better": 0,
        "scores": list(scores),
    }


def task(name, *caches):
    row = {"task": name, "source": "s", "metric": "all", "tokens": 4096, "answer_tokens": 8, "items": 2, "chat_template": True}
    return row | {"caches": list(caches), "seconds": 1.0}


WORDS = "full, second wording"
TASKS = [
    task("vt", answered("full", 1.0, 1.0), answered(WORDS, 1.0, 0.0, full=(1.0, 1.0)), answered("C=4", 1.0, 1.0)),
    task("fwe", answered("full", 1.0, 0.0), answered(WORDS, 1.0, 0.0), answered("C=4", 0.0, 0.0, full=(1.0, 0.0))),
    task("cwe", answered("full", 0.0, 0.0), answered(WORDS, 0.0, 0.0), answered("C=4", 1.0, 1.0)),
]


def test_tasks_that_full_attention_solves_are_compared_with_it(figures, write):
    write("h200/tasks-m-4096.json", evaluation(tasks=TASKS))
    lines = figures["task_figures"].tasks()
    assert lines[0] == "### M, 4096 tokens" and "M.Q4_1.gguf in bf16 on a GPU" in lines[2]
    assert lines[4:9] == [
        "| task | items | full attention, % | full, second wording | C=4 |",
        "|---|---|---|---|---|",
        "| `vt` | 2 | 100.0 | -50.0 [-51.0, -49.0] | +0.0 [-1.0, +1.0] |",
        "| `fwe` | 2 | 50.0 | +0.0 [-1.0, +1.0] | -50.0 [-51.0, -49.0] |",
        "| all | 4 | 75.0 | -25.0 [-75.0, +0.0] | -25.0 [-75.0, +0.0] |",
    ]
    assert lines[-1] == "Not shown, because full attention itself scores below 10 %: `cwe` (0.0)."


def test_a_gpus_tasks_stand_for_a_cpus(figures, write):
    write("cpu/tasks-m-4096.json", evaluation(tasks=TASKS[:1]))
    write("h200/tasks-m-4096.json", evaluation(tasks=TASKS[1:2]))
    assert [row.task for measured in figures["task_figures"].task_results().values() for row in measured.rows] == ["fwe"]


def test_methods_stand_with_their_bits_and_the_change_of_the_mean_score(figures, write):
    bytes_of = {"C=4": {"recipe_hash": "f00d", "read_ratio": 4.0, "stored_ratio": 3.2}, "kivi4": {"stored_ratio": 2.5}}
    bytes_of["quest C=4"] = {"read_ratio": 4.0, "stored_ratio": 1.0}
    measured = [
        task(
            name, answered("full", 1.0, 1.0), answered(WORDS, 1.0, 1.0),
            *(answered(cache, 1.0, score, full=(1.0, 1.0)) | figures_of for cache, figures_of in bytes_of.items()),
        )
        for name, score in (("vt", 0.0), ("fwe", 1.0))
    ]  # fmt: skip
    write("h200/task_methods-m-4096.json", evaluation(tasks=[*measured, TASKS[2]]))
    lines = figures["task_figures"].task_methods()
    assert lines[0] == "### M, tasks of 4096 tokens" and "(assets/task_methods-m-4096.svg)" in lines[4]
    assert lines[6].startswith("`vt`, `fwe`, 2 items each. Full attention on a second wording: +0.0")
    rows = [line.split(" | ") for line in lines if line.startswith("| `")]
    assert [row[:3] for row in rows] == [
        ["| `C=4`", "5.00", "4.00"],
        ["| `quest C=4`", "16.00", "4.00"],
        ["| `kivi4`", "6.40", "6.40"],
    ]
    assert all(row[3].startswith("-25.0 [") for row in rows)
    ((path, chart),) = figures["task_figures"].pictures()
    assert path.name == "task_methods-m-4096.json" and "quest -25 at 4.00" in chart.alt


def test_a_cache_without_all_tasks_has_no_mean(figures, write):
    write("h200/tasks-m-4096.json", evaluation(tasks=[TASKS[0], task("fwe", answered("full", 1.0, 1.0))]))
    assert "| all | 4 | 100.0 | - | - |" in figures["task_figures"].tasks()


def test_the_page_of_costs_has_tasks_where_they_were_measured(figures, write):
    without = figures["quality_figures"].quality()
    assert not any("Tasks of" in line for line in without)
    (row,) = (line for line in without if line.startswith("| SmolLM2-135M-Instruct | 4096 | 0."))
    measured = evaluation(tasks=TASKS)
    measured["model"]["name"] = "SmolLM2-135M-Instruct.Q4_1.gguf"
    write("h200/tasks-m-4096.json", measured)
    lines = figures["quality_figures"].quality()
    cells, before = (
        next(line for line in some if line.startswith("| SmolLM2-135M-Instruct | 4096 | 0.")) for some in (lines, without)
    )
    assert before == row and cells != row and cells.split(" | ")[3] == f"{row.split(' | ')[3]} / -25.0"
    assert (
        lines[-1].startswith("Tasks of SmolLM2-135M-Instruct at 4096 tokens: 2 with 2 items each.")
        and "-25.0 points" in lines[-1]
    )


def test_long_texts_stand_beside_full_attentions(figures, write):
    compared = {"mean": FIGURE, "difference": None}
    full = {
        "repetition": compared, "length": compared, "self_bleu": None, "first_different": None, "texts": 2, "loops": 1,
        "repetition_rates": [[0.5], [0.5]],
    }  # fmt: skip
    ours = full | {"repetition": compared | {"difference": {"mean": -0.01, "low": -0.02, "high": 0.01}}}
    ours |= {"first_different": {"mean": 7.0, "low": 5.0, "high": 9.0}, "self_bleu": compared}
    row = {"context": 4096, "compress": None, "windows": 2, "tokens": 2000, "samples": 1, "sampled": None, "seconds": 1.0}
    rows = [row | {"cache": "full", "greedy": full}, row | {"cache": "C=4", "greedy": ours}]
    write("h200/generations-m.json", evaluation(generations=rows))
    lines = figures["evaluation_figures"].generations()
    assert lines[0] == "### M, at most 2000 tokens" and "2 windows of a, b" in lines[2]
    assert lines[-2:] == [
        "| greedy | `full` | 50.0 | 1 of 2 | 0 | - | - |",
        "| greedy | `C=4` | 50.0 (-1.0 [-2.0, +1.0]) | 1 of 2 | 0 | 7 [5, 9] | 0.500 |",
    ]


def test_pass_keys_are_counted_by_model_and_length(figures, write):
    write(
        "cpu/fidelity-m-needle.json",
        evaluation(needle=[{"tokens": 3500, "depths": [0.0, 1.0], "found": {"full": [True, False]}}]),
    )
    found = {"full": [True, True], "C=4": [False, True]}
    write("h200/fidelity-m-needle.json", evaluation(needle=[{"tokens": 4096, "depths": [0.0, 1.0], "found": found}]))
    lines = figures["evaluation_figures"].pass_keys()
    assert lines[0] == "| model | tokens | pass keys | full | C=4 |"
    assert lines[2:4] == ["| M | 3500 | 2 | 1 | - |", "| M | 4096 | 2 | 2 | 1 |"] and lines[-1].endswith("In a and b.")


def test_times_of_evaluations_that_ended_are_shown(figures, write):
    phases = [("starting", 1.0), ("importing", 2.0), ("loading", 4.0), ("calibrating", 8.0), ("C=4 at 4096 tokens", 16.0)]
    record = {
        "model": "/a/M.gguf",
        "device": "cuda",
        "dtype": "bf16",
        "device_name": "a GPU",
        "seconds": 31.0,
        "complete": True,
    }
    record["phases"] = [{"phase": name, "seconds": seconds} for name, seconds in phases]
    write("h200/evaluation_time-m.json", record)
    write("h200/evaluation_time-n.json", record | {"complete": False})
    assert figures["evaluation_figures"].evaluation_time()[2:] == ["| M | bf16, a GPU | 7 | 8 | 16 |"]
