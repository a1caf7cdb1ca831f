"""vLLM's model runner V2 on the CPU, whose Triton kernels are interpreted: slow, and the only one that has drafts of layers.

A process has one model runner, so this is a program: it reads jobs from a file and writes what the engines said to another.
"""

import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
INSTALLED = importlib.util.find_spec("triton") is not None


def interpret():
    """Let vLLM take Triton for usable on the CPU; call it before vLLM is imported."""
    # The kernel that counts NaN in logits calls a library which the interpreter does not have.
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1", "VLLM_COMPUTE_NANS_IN_LOGITS": "0"}
    from triton import backends

    driver = type("InterpretedDriver", (), {"is_active": staticmethod(lambda: True)})
    backends.backends["cpu"] = backends.Backend(compiler=None, driver=driver)


def answers(job):
    """Return the answers to each round of a job's prompts, and how many drafts were made and accepted."""
    from tests.helpers.serving_engine import ServingEngine

    engine = ServingEngine(job["folder"], job["elastickv"], **job["options"])
    assert engine.runner_module.startswith("vllm.v1.worker.cpu.model_runner")
    rounds = [engine.generate(job["prompts"], job["tokens"]) for _ in range(job.get("rounds", 1))]
    counts = [engine.counter(f"vllm:spec_decode_num_{name}_tokens") for name in ("draft", "accepted")]
    engine.close()
    return rounds, *counts


def run(jobs, folder):
    """Return `answers` of each job, from a process of its own."""
    asked, said = folder / "jobs.pickle", folder / "answers.pickle"
    asked.write_bytes(pickle.dumps(jobs))
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.helpers.interpreted_runner", str(asked), str(said)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return pickle.loads(said.read_bytes())


if __name__ == "__main__":
    interpret()
    Path(sys.argv[2]).write_bytes(pickle.dumps([answers(job) for job in pickle.loads(Path(sys.argv[1]).read_bytes())]))
