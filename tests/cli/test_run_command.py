"""`elastickv run` and `elastickv bench --model` as a shell sees them, on models of a few thousand weights."""

import json
import shutil
import statistics

import pytest

from tests.helpers.model_matrix import model
from tests.helpers.tiny_models import TEXT

PROMPT = TEXT[:300]


def generated(folder, prompt, tokens):
    """Return the text that `generate` alone makes, character by character."""
    import torch
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[ord(c) for c in prompt]])
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return "".join(chr(int(i)) for i in found[0, len(prompt) :])


def test_a_prompt_goes_in_and_the_text_comes_out(elastickv, folder, tmp_path):
    target = tmp_path / "receipt.json"
    done = elastickv("run", folder, "--raw", "--prompt", PROMPT, "--compress=1", "--max-new-tokens=6", f"-o{target}")
    assert done.returncode == 0, done.stderr
    text = generated(folder, PROMPT, 6)
    assert done.stdout == text + ("" if text.endswith("\n") else "\n")
    record = json.loads(target.read_text(encoding="utf-8"))
    assert record["text"] == text and record["speedup"] is None
    (cache,) = record["caches"]
    assert (cache["cache"], cache["prompt_tokens"], cache["new_tokens"]) == ("elastic", 300, 6)
    assert "tokens/s" in done.stderr and "first token" in done.stderr and "KV stored" in done.stderr


def test_the_prompt_may_be_a_file_or_come_through_a_pipe(elastickv, folder, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    options = ("--raw", "--compress=1", "--max-new-tokens=3")
    of_file = elastickv("run", folder, f"--file={tmp_path / 'prompt.txt'}", *options)
    piped = elastickv("run", folder, *options, stdin=PROMPT)
    assert of_file.returncode == piped.returncode == 0, of_file.stderr + piped.stderr
    assert of_file.stdout == piped.stdout == generated(folder, PROMPT, 3).rstrip("\n") + "\n"


def test_a_chat_template_is_applied_unless_the_prompt_is_raw(elastickv, folder, tmp_path):
    for options, tokens in (((), 302), (("--raw",), 300)):
        elastickv("run", folder, f"-p{PROMPT}", "--max-new-tokens=2", "--recipe=int8", f"-o{tmp_path / 'x.json'}", *options)
        record = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
        assert record["caches"][0]["prompt_tokens"] == tokens
        assert (record["compress"], record["recipe"]) == (None, "int8")


def test_a_paired_baseline_has_a_receipt_and_the_ratio_an_interval(elastickv, folder, tmp_path):
    done = elastickv(
        "run", folder, f"-p{PROMPT}", "--compress=1", "--max-new-tokens=110", "--paired-baseline", f"-o{tmp_path / 'x.json'}"
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert [(cache["cache"], cache["new_tokens"]) for cache in record["caches"]] == [("stock", 110), ("elastic", 110)]
    assert record["same_text"] is True and len(record["text"]) == 110
    # Turns of 32, 32, 32 and 14 tokens; the first carries the prompt.
    assert record["speedup"]["samples"] == 3
    assert "times as fast, 3 pairs" in done.stderr
    page = elastickv("report", tmp_path / "x.json", "-o", tmp_path / "x.html")
    assert page.returncode == 0, page.stderr
    assert elastickv("compare", tmp_path / "x.json", tmp_path / "x.json").returncode == 0


def test_two_turns_make_no_interval_and_the_summary_says_so(elastickv, folder, tmp_path):
    done = elastickv(
        "run", folder, f"-p{PROMPT}", "--compress=1", "--max-new-tokens=40", "--paired-baseline", f"-o{tmp_path / 'x.json'}"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["speedup"] is None
    assert "times as fast, no interval: fewer than 3 pairs" in done.stderr


def test_without_a_calibration_one_warning_says_so(elastickv, folder):
    done = elastickv("run", folder, f"-p{PROMPT}", "--max-new-tokens=2", "--compress=8")
    assert done.stderr.count("warning") == 1 and "elastickv calibrate" in done.stderr


def test_layers_whose_keys_do_not_suit_are_warned_of_once_and_named(elastickv, folder, tmp_path):
    import torch

    made = model("qwen2")
    with torch.no_grad():
        made.model.layers[1].self_attn.k_proj.bias[62] = 400
    shutil.copytree(folder, tmp_path / "biased")
    made.save_pretrained(tmp_path / "biased")
    done = elastickv("run", tmp_path / "biased", "--raw", f"-p{PROMPT}", "--max-new-tokens=2", "--compress=1.8")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the keys of layer 1 lose") == 1
    assert "recipe int8; k=int8_per_channel" in done.stderr and "in layers 1\n" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["-pa", "-fb"], "give one"),
        (["-f/no/such/file"], "/no/such/file"),
        ([], "the prompt is empty"),
        (["-p", "  "], "the prompt is empty"),
        (["-pa", "--max-new-tokens=0"], "--max-new-tokens=0"),
        (["-pa", "--max-new-tokens=9999"], "4096 positions"),
        (["-pa", "--compress=0.5"], "compress=0.5"),
        (["-pa", "--compress=4", "--recipe=int4"], "give one"),
        (["-pa", "--recipe=int5"], "int5"),
        (["-pa", "--temperature=-1"], "temperature -1"),
        (["-pa", "--dtype=int8"], "choose fp32, fp16, bf16"),
        (["-pa", "--calibration=/no/such/file"], "/no/such/file"),
        (["-pa", "--output=/no/such/folder/x.json"], "does not exist"),
    ],
)
def test_bad_input_of_run_is_one_line_and_exit_2(elastickv, folder, arguments, named):
    done = elastickv("run", folder, *arguments)
    assert done.returncode == 2
    assert named in done.stderr and "Traceback" not in done.stderr and done.stdout == ""
    assert sum("error:" in line for line in done.stderr.splitlines()) == 1


QUICK = ("--context=300", "--reps=4", "--decode-tokens=2")


def test_a_shape_is_measured_with_stock_and_elastic_caches(elastickv, tmp_path):
    target = tmp_path / "x.json"
    done = elastickv("bench", "--model=shape:tiny", "--batch=2", "--compress=8", *QUICK, f"--output={target}")
    assert done.returncode == 0, done.stderr
    record = json.loads(target.read_text(encoding="utf-8"))
    assert [cache["cache"] for cache in record["caches"]] == ["stock", "elastic"]
    assert record["not_run"] == {"stock static+compile": "needs CUDA"} and "needs CUDA" in done.stdout
    for cache in record["caches"]:
        # Six tokens to begin with; then samples of two steps behind one that is not counted.
        assert (cache["rows"], cache["new_tokens"]) == (2, 6 + 4 * 3)
        assert [len(sample) for sample in cache["step_s"]] == [2] * 4
        counted = [step for sample in cache["step_s"] for step in sample]
        assert cache["tokens_per_s"] == pytest.approx(2 * len(counted) / sum(counted))
        assert cache["median_step_ms"] == pytest.approx(1e3 * statistics.median(counted))
        assert cache["step_ms"]["low"] <= cache["step_ms"]["estimate"] <= cache["step_ms"]["high"]
        # What a step reads, at the speed that this machine reads at.
        assert cache["kv_read_bytes_per_step"] == cache["kv_read_bytes"] / (cache["new_tokens"] - 1)
        floor_s = (record["model"]["read_weights_bytes"] + cache["kv_read_bytes_per_step"]) / record["machine"][
            "read_ceiling_gbs"
        ]
        assert cache["floor_ms"] == pytest.approx(floor_s / 1e6)
        assert cache["of_floor"] == pytest.approx(2e3 / cache["tokens_per_s"] / cache["floor_ms"])
        # Two layers of one KV head with 64 channels, keys and values: the last token is not in the cache.
        assert cache["kv_dense_bytes"] == 2 * (300 + 17) * 2 * 2 * 64 * 2
    assert record["machine"]["name"] == record["environment"]["cpu"] and record["machine"]["read_ceiling_gbs"] > 0
    # The output matrix is read whole, of the embedding a row.
    assert record["model"]["weights_bytes"] - record["model"]["read_weights_bytes"] == 128 * 64 * 4
    stock, ours = record["caches"]
    assert ours["kv_stored_bytes"] < stock["kv_stored_bytes"] and ours["kv_read_bytes"] < stock["kv_read_bytes"]
    assert ours["storing_share_of_first_token"] == ours["storing_s"] / ours["first_token_s"]
    assert record["speedups"]["stock"]["samples"] == 4 and record["noise_floor"] is None  # two pairs make no interval
    assert len(ours["recipe_hash"]) == 12 and record["baseline"] == "stock"
    assert "warning" not in done.stderr, "random weights have nothing to calibrate"


def test_a_models_own_folder_is_measured_and_shown_as_json(elastickv, folder):
    done = elastickv("bench", f"--model={folder}", "--recipe=int8", "--json", *QUICK)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["model"]["name"] == "tiny" and record["model"]["random_weights"] is False
    assert set(record["caches"][1]["recipes"].values()) == {"int8"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model=shape:9b"], "shape:8b"),
        (["--model=shape:tiny", "--heads=2"], "--heads"),
        (["--model=shape:tiny", "--context=1"], "--context=1"),
        (["--model=shape:tiny", "--context=9000"], "8192 positions"),
        (["--model=shape:tiny", "--batch=0"], "--batch=0"),
        (["--model=shape:tiny", "--reps=1"], "--reps=1"),
        (["--model=shape:tiny", "--decode-tokens=0"], "--decode-tokens=0"),
        (["--model=shape:tiny", "--compress=0.5"], "compress=0.5"),
        (["--model=shape:tiny", "--dtype=int8"], "--dtype=int8"),
        (["--model=shape:tiny", "--backend=tpu"], "auto, cuda, cpu"),
        (["--model=shape:tiny", "--format=xml"], "table, json"),
        (["--model=/no/such/folder"], "does not exist"),
        (["--calibration=x.json"], "--model"),
    ],
)
def test_bad_input_of_a_models_benchmark_is_one_line_and_exit_2(elastickv, arguments, named):
    done = elastickv("bench", *arguments)
    assert done.returncode == 2
    assert named in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


def test_a_shape_too_large_for_the_machine_is_refused_with_what_would_fit(elastickv, monkeypatch):
    from elastickv.model_benchmark import bench

    arguments = ("bench", "--model=shape:1b", "--context=100000", "--compress=1", "--dtype=bf16")
    weights = 1_235_814_400 * 2
    # Weights, a prompt's pass of 100866 tokens (7.6 GiB) and 3.2 GiB of keys and values at 16 bit, but not at 4.
    monkeypatch.setattr(bench, "free_bytes", lambda device: weights + (9 << 30))
    done = elastickv(*arguments)
    assert done.returncode == 2
    assert "--compress" in done.stderr and "--context 65536" in done.stderr and "would fit" in done.stderr
    monkeypatch.setattr(bench, "free_bytes", lambda device: weights // 2)
    assert "nothing shorter would fit" in elastickv(*arguments).stderr


def failing(of, error, times):
    """Return what a generation's prompt meets: `error`, the first `times` that one with the cache named `of` begins."""
    from elastickv.model_benchmark.generation import Generation

    begun, left = Generation.advance, [times]

    def advance(self, tokens, heard=None):
        if self.name == of and self.prompt_tokens > 192 and left[0]:
            left[0] -= 1
            begun(self, 1)
            raise error
        return begun(self, tokens, heard)

    return advance


def test_a_stock_cache_that_fails_is_not_run_and_the_rest_goes_on(elastickv, monkeypatch):
    import torch

    from elastickv.model_benchmark.generation import Generation

    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 34 GiB.\nMore.")
    monkeypatch.setattr(Generation, "advance", failing("stock", error, 1))
    done = elastickv("bench", "--model=shape:tiny", "--json", *QUICK)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert [cache["cache"] for cache in record["caches"]] == ["elastic"]
    assert record["not_run"]["stock"] == "out of memory: CUDA out of memory. Tried to allocate 34 GiB."
    assert record["speedups"] == {} and record["baseline"] is None and record["faster"] is None


def test_the_elastic_cache_is_measured_alone_where_nothing_fits_beside_it(elastickv, monkeypatch):
    from elastickv.model_benchmark.generation import Generation

    error = RuntimeError("CUDA driver: CUDA_ERROR_OUT_OF_MEMORY")
    monkeypatch.setattr(Generation, "advance", failing("elastic", error, 1))
    done = elastickv("bench", "--model=shape:tiny", "--json", *QUICK)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    (ours,) = record["caches"]
    assert (ours["cache"], ours["new_tokens"]) == ("elastic", 6 + 4 * 3)
    assert "left no memory" in record["not_run"]["stock"] and "OUT_OF_MEMORY" in record["not_run"]["stock"]


def test_an_elastic_cache_that_does_not_fit_alone_is_a_line(elastickv, monkeypatch):
    import torch

    from elastickv.model_benchmark.generation import Generation

    monkeypatch.setattr(Generation, "advance", failing("elastic", torch.OutOfMemoryError("no 9 GiB"), 2))
    done = elastickv("bench", "--model=shape:tiny", *QUICK)
    assert done.returncode == 2 and "no 9 GiB" in done.stderr and "--context" in done.stderr


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("options", [(), ("--raw",), ("--paired-baseline",), ("--raw", "--paired-baseline", "--recipe=int8")])
def test_few_new_tokens_after_a_short_prompt(elastickv, folder, tmp_path, tokens, options):
    done = elastickv("run", folder, "-pHi", f"--max-new-tokens={tokens}", f"-o{tmp_path / 'x.json'}", *options)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert all(cache["new_tokens"] == tokens for cache in record["caches"])
    assert done.stdout.rstrip("\n") == record["text"].rstrip("\n") and len(record["text"]) == tokens


@pytest.mark.parametrize("tokens", [1, 5, 100])
def test_a_prompt_up_to_the_models_last_position_runs_and_a_longer_one_is_refused_before_weights_are_loaded(
    elastickv, folder, tokens, monkeypatch
):
    positions = 4096
    prompt = (TEXT * 2)[: positions - tokens]
    done = elastickv("run", folder, "--raw", f"-p{prompt}", "--recipe=int8", f"--max-new-tokens={tokens}")
    assert done.returncode == 0, done.stderr

    def loads(*_, **__):
        raise AssertionError("the weights are loaded")

    monkeypatch.setattr("elastickv.transformers.model_loading.Checkpoint.load", loads)
    done = elastickv("run", folder, "--raw", f"-p{prompt}", "--recipe=int8", f"--max-new-tokens={tokens + 1}")
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and f"{positions - tokens} tokens of prompt and {tokens + 1} new ones" in said
    assert f"{positions} positions" in said and done.stdout == ""


@pytest.mark.parametrize(
    ("option", "starts", "said"),
    [
        ("--compress=4", {"reads_less_from": 164, "ratio_from": 704}, "at most 1/4 from 704 on"),
        (
            "--recipe=int8",
            {"reads_less_from": 164, "ratio_from": None},
            "from 164 tokens of context on; this run has at most 4",
        ),
        ("--compress=1", {"reads_less_from": None, "ratio_from": None}, "nothing is compressed"),
    ],
)
def test_where_compression_starts_is_said_before_the_weights_are_loaded_and_in_the_result(
    elastickv, folder, tmp_path, option, starts, said
):
    """After 4 sinks and a window of 128, the first page of 32 tokens is cold."""
    done = elastickv("run", folder, "--raw", "-pHi", "--max-new-tokens=2", option, f"-o{tmp_path / 'x.json'}")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert record["compression"] == starts
    before, after = done.stderr.split("elastickv: loading\n")
    assert said in before and said.split(";")[0] in after.splitlines()[-1]


def test_a_shape_generates_noise_with_random_weights(elastickv, tmp_path):
    target = tmp_path / "x.json"
    done = elastickv("run", "shape:tiny", "-pHi", "--max-new-tokens=9", "--compress=4", f"-o{target}")
    assert done.returncode == 0, done.stderr
    record = json.loads(target.read_text(encoding="utf-8"))
    assert record["model"]["name"] == "shape:tiny" and record["model"]["random_weights"] is True
    assert record["text"] == done.stdout[:-1] and len(record["text"]) == 9 and record["text"].isprintable()
    assert "random weights" in done.stderr and "warning" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "MODEL", "-pHi"),
        ("eval", "MODEL"),
        ("calibrate", "MODEL"),
        ("bench", "--model", "MODEL"),
        ("baseline", "transformers", "MODEL"),
    ],
    ids=str,
)
@pytest.mark.parametrize("model", ["/no/such/model", "no such model", "shape:9b", "model.gguf", "x" * 100, "a\udcffb"])
def test_a_model_that_does_not_exist_is_refused_alike_everywhere(elastickv, arguments, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = elastickv(*(model if argument == "MODEL" else argument for argument in arguments))
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""
    if model == "shape:9b":
        assert "shape:9b" in said and ("shape:8b" in said or "random weights" in said)
    else:
        assert "does not exist: give a model's folder, a .gguf file, a hub id (OWNER/NAME) or shape:NAME (" in said


@pytest.mark.parametrize("command", ["eval", "calibrate"])
def test_quality_of_random_weights_is_refused_and_says_why(elastickv, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = elastickv(command, "shape:tiny")
    assert done.returncode == 2 and "shape:tiny has random weights" in done.stderr and "hub id" in done.stderr
    assert list(tmp_path.iterdir()) == []
