"""Heads split over two processes, each of which loads the plug-in and has caches of its own."""

import json
import subprocess
import sys
from pathlib import Path

from tests.helpers.serving_scenarios import LENGTHS, random_prompts

ROOT = Path(__file__).parents[2]


def test_two_ranks_answer_as_one_engine_does(serve, folder):
    alone = [answer.tokens for answer in serve().generate(random_prompts(LENGTHS), 24)]
    command = [sys.executable, "-m", "tests.helpers.parallel_engine", str(folder), "2"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    answers = [line.partition("ANSWERS")[2] for line in output.stdout.splitlines() if "ANSWERS" in line]
    assert answers, output.stderr[-2000:]
    assert json.loads(answers[-1]) == alone
