"""The programs as a shell sees them: exit codes, stdout, one line on stderr."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
QUICK = ["--reps=4", "--warmup=1", "--inner_loops=2", "--cache=hot", "--seq=300", "--heads=2", "--backend=cpu"]


def shell(module, *arguments, **options):
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "COLUMNS": "100"}
    program = [sys.executable, "-c", f"from {module} import main; main()", *arguments]
    return subprocess.run(program, capture_output=True, text=True, env=environment, timeout=300, check=False, **options)


def elastickv(*arguments, **options):
    return shell("elastickv.cli", *arguments, **options)


def original(*arguments, **options):
    return shell("elastickv.cli.elastic_kv_cli", *arguments, **options)


def test_the_original_command_line_prints_json_with_the_originals_keys_and_nothing_else():
    done = original("--seq=300", "--heads", "2", "--dim=64", "--compress=1.3", "--paired_baseline", "--reps=4", "--warmup=1",
                    "--inner-loops=2", "--truncate=5", "--inference", "--decode_tokens=2", "--no-graphs", "--json",
                    "--backend=cpu", "--layers=1", "--cache=hot")  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["build"]["cuda_graphs"] is False
    assert result["configuration"]["compression"] == 1.3
    assert result["inference_cycle"]["decode_tokens"] == 2
    assert result["results"]["speedup_vs_baseline"] > 0
    assert done.stdout.index('"results"') < done.stdout.index('"inference_cycle"')


def test_bench_shows_a_table_and_writes_what_the_suffix_says(tmp_path):
    target = tmp_path / "result.json"
    done = elastickv("bench", *QUICK, "--compress=1.3", "--paired-baseline", "--gate", "cv>=0", "--output", str(target))
    assert done.returncode == 0, done.stderr
    assert "speed-up" in done.stdout
    assert "recipe error" in done.stdout
    assert json.loads(target.read_text())["recipe"]["text"] in done.stdout
    assert "measuring" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--seq=abc"], "'abc'"),
        (["--seq", "-5"], "--seq=-5"),
        (["--seq=0"], "--seq=0"),
        (["--seq=99999999999999999999"], "--seq"),
        (["--no-such-option"], "--no-such-option"),
        (["stray"], "stray"),
        (["--heads=3", "--kv-heads=2"], "multiple"),
        (["--compress=0.5"], "compress=0.5"),
        (["--compress=nan"], "compress=nan"),
        (["--compress=64"], "context"),
        (["--dim=100"], "supported are"),
        (["--recipe=int5"], "int5"),
        (["--dtype=int8"], "--dtype=int8"),
        (["--preset=medium"], "long, short"),
        (["--format=xml"], "table, json"),
        (["--backend=tpu"], "auto, cuda, cpu"),
        (["--gate=silver"], "golden"),
        (["--output=/no/such/folder/x.json"], "does not exist"),
        (["--input=/no/such/file"], "/no/such/file"),
        (["--seq=1048576", "--heads=4096", "--dim=256", "--backend=cpu"], "would fit"),
        (["--reps"], "--reps"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, named):
    done = elastickv("bench", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert errors[0] == done.stderr.splitlines()[-1]
    assert named in errors[0]
    assert "Traceback" not in done.stderr


def test_without_a_gpu_asking_for_one_says_what_to_install():
    done = elastickv("bench", "--backend=cuda", "--device=1023")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_no_arguments_and_help():
    assert "bench" in elastickv("--help").stdout
    assert "--paired-baseline" in elastickv("bench", "--help").stdout
    assert elastickv("no-such-command").returncode == 2
    assert elastickv("--version").stdout.startswith("elastickv")


def test_importing_the_package_imports_no_array_library():
    code = "import sys, elastickv; print(sorted({'numpy', 'numba', 'torch', 'rich'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(SOURCE)}, check=True
    )
    assert done.stdout.strip() == "[]"


def test_help_imports_no_array_library():
    code = (
        "import sys\nfrom elastickv.cli import root\nroot.main(['--help'], standalone_mode=False)\n"
        "print(sorted({'numpy', 'numba', 'torch'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(SOURCE)}, check=True
    )
    assert done.stderr.strip() == "[]"


def test_doctor_says_what_will_be_used():
    done = elastickv("doctor", "--no-ceilings")
    assert done.returncode == 0, done.stdout
    assert "will use: " in done.stdout
    assert "cpu backend: Numba" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--compile-all", "--arch=5.2"], "--arch=5.2 is unknown: choose 6.1, 7.0"), (["--arch=9.0"], "--compile-all")],
)
def test_doctor_refuses_an_architecture_that_it_does_not_compile_for(arguments, said):
    done = elastickv("doctor", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert said in done.stderr and len(done.stderr.splitlines()) == 1


def test_only_the_originals_name_has_a_time_limit_of_its_own(monkeypatch):
    from elastickv.cli import bench, elastic_kv_cli

    received = []
    monkeypatch.setattr(bench, "_run", lambda arguments, *_: received.append(arguments["time_limit_s"]))
    for command in (bench.command, elastic_kv_cli.command):
        for arguments in ([], ["--time-limit=300"], ["--model=shape:8b"]):
            command.main(arguments, standalone_mode=False)
    limit = elastic_kv_cli.TIME_LIMIT_S
    assert received == [None, 300.0, None, limit, 300.0, None]
    assert limit < 120  # scripts written for the original end it then
    assert f"[default: {limit:g}]" in original("--help").stdout


def test_the_original_command_line_measures_fewer_repetitions_on_a_slow_machine_and_says_how_many():
    code = "from tests.cli.reference_bench import *; import elastickv.cli.bench"
    code += "; from elastickv.cli import elastic_kv_cli as program"
    code += "; program.command = elastickv.cli.bench.build_command('elastic_kv_cli', '', 'json', 2.0); program.main()"
    root = SOURCE.parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SOURCE), str(root)])}
    arguments = ["--seq=300", "--heads=2", "--compress=1.3", "--paired-baseline", "--reps=20000", "--warmup=5", "--cache=hot"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["configuration"]["reps"] == result["repetitions"]["requested"] == 20000
    assert 2 <= result["repetitions"]["executed"] == len(result["samples"]["elastic"]) < 20000
    assert any(warning.startswith("stopped by the time limit after") for warning in result["warnings"])
