"""The other end of `engine_process` without vLLM: what it does is the `model` that it is asked for."""

import json
import os
import signal
import sys
import time

import numpy as np


def reply(value):
    print(json.dumps(value), flush=True)


def main():
    arguments = json.loads(sys.stdin.readline())
    behavior = arguments["model"]
    if behavior == "ends":
        print("ValueError: no such model\n", file=sys.stderr)
        sys.exit(3)
    if behavior and behavior.startswith("rank: "):
        print("(Worker_TP1 pid=7) INFO 01-01 00:00:00 [runner.py:1] SomeError: none", file=sys.stderr)
        print(f"(Worker_TP1 pid=7) ERROR 01-01 00:00:00 [executor.py:9] {behavior.removeprefix('rank: ')}", file=sys.stderr)
        reply({"error": "Exception: failed in a background process. See stack trace", "kind": None})
        return
    if behavior in ("UsageError", "NonFiniteError", None):
        reply({"error": "what was wrong", "kind": behavior})
        return
    started = os.environ.get("STARTED_WITH"), os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]
    reply({"environment": {"process": os.getpid(), "started": started}, "recipes": {"1": "int4", "0": "int8"}})
    for line in sys.stdin:
        request = json.loads(line)
        if behavior == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if request["logits"] is not None:
            np.save(request["logits"], np.full((len(request["forced"]), 7), len(request["prompt"]), np.float32))
        reply({"tokens": [request["forced"][0]] * request["tokens"]})
    while behavior == "stays":
        time.sleep(0.1)


if __name__ == "__main__":
    main()
