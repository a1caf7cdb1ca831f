"""`elastickv calibrate` and `elastickv eval` as a shell sees them, on a model of a few thousand weights."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from elastickv.recipe import ModelCalibration

ROOT = Path(__file__).parents[2]
QUICK = [
    "--context=500", "--windows=2", "--scored=4", "--compress=1,2,64", "--needle=450", "--depths=2", "--greedy=2",
]  # fmt: skip


def test_a_model_is_calibrated_and_evaluated(elastickv, folder, tmp_path):
    calibration, result, text = tmp_path / "tiny.json", tmp_path / "result.json", folder.parent / "text.txt"
    done = elastickv("calibrate", str(folder), f"--text={folder.parent / 'other.txt'}", f"-o{calibration}", "--tokens=1000")
    assert done.returncode == 0, done.stderr
    assert "2 layers x 1 KV heads of tiny" in done.stdout
    assert ModelCalibration.load(calibration).tokens == 1000
    done = elastickv(
        "eval", str(folder), f"--text={text}", f"--calibration={calibration}", f"-o{result}", "--tolerance=kl=0.001", *QUICK,
        "--stored-bits=2.5,5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(result.read_text(encoding="utf-8"))
    assert [row["cache"] for row in record["rows"]] == ["C=1", "C=2", "stored_bits=5", "reference:stored_bits=5"]
    assert "stored_bits=2.5 is less than any calibrated format that the CPU reads takes: give 2.75 or more" in done.stdout
    assert "compress=64 cannot be met" in done.stdout and "Largest C within kl=0.001: 1" in done.stdout
    assert "warning" not in done.stderr
    older = json.loads(calibration.read_text(encoding="utf-8"))
    del older["sensitivity"]
    calibration.write_text(json.dumps(older), encoding="utf-8")
    done = elastickv(
        "eval", str(folder), f"--text={text}", f"--calibration={calibration}", *QUICK, "--compress=none", "--needle=none",
        "--greedy=0", "--stored-bits=5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning") == 1 and f"elastickv calibrate {folder} --dtype fp32" in done.stderr


def test_without_a_calibration_one_warning_names_the_command(elastickv, folder):
    done = elastickv("eval", str(folder), f"--text={folder.parent / 'text.txt'}", *QUICK, "--needle=none", "--greedy=0")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning") == 1 and f"elastickv calibrate {folder}" in done.stderr


def test_formats_are_compared_at_equal_windows(elastickv, folder, tmp_path):
    result = tmp_path / "formats.json"
    done = elastickv(
        "eval", str(folder), f"--text={folder.parent / 'text.txt'}", *QUICK, "--needle=none", "--greedy=0", "--compress=none",
        "--formats=kivi4,int4", "--formats=k=int8,v=int4", "--exact-tokens=4+64", f"-o{result}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(result.read_text(encoding="utf-8"))["rows"]
    assert [row["cache"] for row in rows] == ["kivi4", "int4", "k=int8,v=int4"]
    assert [row["stored_format"]["exact_keys"] for row in rows] == [83, 83, 83], "68 of 499 tokens, and 15 that fill no page"
    assert "stored bits" in done.stdout and "arXiv 2402.02750" in done.stdout
    assert "--calibration" not in done.stderr, "there is no C to calibrate for"


def test_selections_are_measured_at_each_c(elastickv, folder, tmp_path):
    result = tmp_path / "selections.json"
    done = elastickv(
        "eval", str(folder), f"--text={folder.parent / 'text.txt'}", *QUICK, "--needle=none", "--greedy=0", "--compress=2",
        "--selections=h2o,quest_every_layer", f"-o{result}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(result.read_text(encoding="utf-8"))["rows"]
    assert [row["cache"] for row in rows] == ["C=2", "h2o C=2", "quest_every_layer C=2"]
    assert all(row["read_ratio"] >= 2 for row in rows) and "arXiv 2306.14048" in done.stdout


def test_tasks_and_questions_of_a_file_are_scored_beside_full_attention(elastickv, folder, tmp_path):
    result, questions = tmp_path / "tasks.json", tmp_path / "questions.jsonl"
    questions.write_text(
        '{"context": "It was cold.", "question": "How?", "answers": ["cold"], "metric": "part"}', encoding="utf-8"
    )
    done = elastickv(
        "eval", str(folder), "--context=none", "--needle=none", "--compress=1", "--tasks=fwe", "--task-lengths=1200",
        "--task-items=2", "--task-batch=1", f"--dataset={questions}", f"-o{result}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(result.read_text(encoding="utf-8"))
    assert [record["tasks"][0][name] for name in ("task", "tokens", "items")] == ["fwe", 1200, 2]
    for task in record["tasks"]:
        assert [cache["cache"] for cache in task["caches"]] == ["full", "full, second wording", "C=1"]
        assert task["caches"][0]["scores"] == task["caches"][2]["scores"]
    assert "questions.jsonl" in done.stdout and "full, second wording" in done.stdout


def test_long_texts_are_generated_with_each_cache(elastickv, folder, tmp_path):
    result = tmp_path / "generated.json"
    done = elastickv(
        "eval", str(folder), f"--text={folder.parent / 'text.txt'}", *QUICK, "--needle=none", "--greedy=0", "--compress=1",
        "--generate=8", "--samples=2", "--temperature=0.7", "--top-p=0.9", "--seed=3", f"-o{result}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(result.read_text(encoding="utf-8"))
    assert record["options"]["generation"] == {"tokens": 8, "samples": 2, "temperature": 0.7, "top_p": 0.9, "seed": 3}
    assert [row["cache"] for row in record["generations"]] == ["full", "C=1"]
    assert record["generations"][1]["sampled"]["first_different"]["mean"] == 8 and "self-BLEU" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tasks=qa_1"], "task qa_1 is unknown: choose all, niah_single_1"),
        (["--tasks=vt", "--task-lengths=4k"], "--task-lengths=4k is no list of numbers"),
        (["--tasks=vt", "--task-items=0"], "--task-items=0 is out of range"),
        (["--tasks=vt", "--task-lengths=100"], "--task-lengths=100 is too short for vt: give "),
        (["--dataset=/no/such/file"], "/no/such/file"),
        (["--context=none", "--needle=none"], "give --context, --needle, --tasks or --dataset"),
        (["--context=none", "--tolerance=kl=1"], "--tolerance is of windows, and there are none"),
        (["--generate=-1"], "--generate=-1 is out of range"),
        (["--generate=9000"], "positions: give a shorter --context, or fewer tokens to --generate"),
        (["--samples=-1"], "--samples=-1 is out of range"),
        (["--temperature=0"], "--temperature=0 is out of range: give a number above 0"),
        (["--top-p=1.2"], "--top-p=1.2 is out of range: give a number above 0 and up to 1"),
        (["--seed=-1"], "--seed=-1 is out of range"),
        (["--formats=q4_1"], "format q4_1 is unknown: choose all, fp8_per_tensor"),
        (["--formats=k=int4,v=int5"], "format 'int5' is unknown"),
        (["--selections=quests"], "selection quests is unknown: choose all, streaming_llm, quest"),
        (["--selections=h2o", "--compress=1"], "--selections need a budget: give values of C above 1 in --compress"),
        (["--exact-tokens=132"], "--exact-tokens=132 is unknown: write own, or sinks and window as in 4+128"),
        (["--stored-bits=4.75"], "--stored-bits=4.75 needs a calibration, which says what each layer loses"),
        (["--stored-bits=none"], "--stored-bits=none is no list of numbers: write for example 4.25,4.75"),
        (["--stored-bits=0,4"], "--stored-bits=0,4 is out of range: give numbers above 0 and at most 16"),
        (["--stored-bits=17"], "--stored-bits=17 is out of range: give numbers above 0 and at most 16"),
        (["--stored-bits=nan"], "--stored-bits=nan is out of range: give numbers above 0 and at most 16"),
        (["--compress=none"], "give values of C in --compress, or --formats"),
        (["--compress=four"], "--compress=four"),
        (["--compress=0"], "--compress=0"),
        (["--context=-1"], "--context=-1"),
        (["--windows=0"], "--windows=0"),
        (["--tolerance=ppl"], "write ppl=0.5%"),
        (["--reference=eager"], "choose stock-quantized"),
        (["--engine=sglang"], "--engine sglang is unknown: choose transformers, vllm"),
        (["--text=/no/such/file"], "/no/such/file"),
        (["--calibration=/no/such/file"], "/no/such/file"),
        (["--output=/no/such/folder/x.json"], "does not exist"),
        (["--plot=figure.txt"], ".png, .svg, .pdf"),
        (["--dtype=int8"], "choose fp32, fp16, bf16"),
    ],
)
def test_bad_input_of_eval_is_one_line_and_exit_2(elastickv, folder, arguments, named):
    done = elastickv("eval", str(folder), *QUICK, *arguments)
    assert done.returncode == 2
    assert named in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ("/no/such/folder", "does not exist"),
        ("no such model", "does not exist"),
        ("absent.gguf", "absent.gguf does not exist"),
        (".", "without a config.json"),
        ("pyproject.toml", "neither a folder nor a .gguf file"),
    ],
)
def test_a_model_that_is_not_there_is_refused(elastickv, monkeypatch, model, named, tmp_path):
    monkeypatch.chdir(ROOT)
    done = elastickv("calibrate", model, f"-o{tmp_path / 'x.json'}")
    assert done.returncode == 2
    assert named in done.stderr and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["t5", "mamba"])
def test_a_model_without_a_decoders_cache_is_refused(elastickv, kind, tmp_path):
    import transformers

    config = {"t5": transformers.T5Config(), "mamba": transformers.MambaConfig()}[kind]
    config.save_pretrained(tmp_path / kind)
    done = elastickv("calibrate", str(tmp_path / kind), f"-o{tmp_path / 'x.json'}")
    assert done.returncode == 2
    assert {"t5": "encoder-decoder", "mamba": "no KV cache"}[kind] in done.stderr


def test_a_calibration_of_another_model_or_version_is_refused(elastickv, folder, tmp_path):
    path = tmp_path / "tiny.json"
    done = elastickv("calibrate", str(folder), f"--text={folder.parent / 'other.txt'}", f"-o{path}", "--tokens=1000")
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text(encoding="utf-8"))
    for change, named in (({"fingerprint": "0" * 16}, "is of tiny"), ({"version": 99}, "version 99")):
        path.write_text(json.dumps(record | change), encoding="utf-8")
        done = elastickv("eval", str(folder), f"--text={folder.parent / 'text.txt'}", *QUICK, f"--calibration={path}")
        assert done.returncode == 2
        assert named in done.stderr and "elastickv calibrate" in done.stderr


def test_a_missing_extra_is_one_line_with_the_command(folder):
    program = (
        "import importlib.util, sys\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'torch' else found(name, *rest)\n"
        f"sys.argv = ['elastickv', 'eval', {str(folder)!r}]\n"
        "from elastickv.cli import main; main()"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert 'pip install "elastickv[transformers]"' in done.stderr and done.stderr.count("\n") == 1


def test_every_option_in_the_document_exists():
    from elastickv.cli import calibrate
    from elastickv.cli import eval as evaluation

    known = {name for module in (calibrate, evaluation) for parameter in module.command.params for name in parameter.opts}
    used = set(re.findall(r"(--[a-z][a-z-]*)", (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")))
    others = {"--model", "--contexts", "--folder"}  # of lm-evaluation-harness and of scripts in benchmarks
    assert used and used - others <= known


def test_a_calibration_that_cannot_be_written_is_on_standard_output(elastickv, folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("elastickv.results.files.os.replace", full)
    target = tmp_path / "x.json"
    done = elastickv("calibrate", folder, f"--text={folder.parent / 'text.txt'}", "--tokens=800", f"-o{target}")
    assert done.returncode == 2 and "No space left on device" in done.stderr and not target.exists()
    assert json.loads(done.stdout)["tokens"] == 800
