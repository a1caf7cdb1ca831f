"""Fuzz every parser and write what happened: `python -m tests.fuzz --runs 10000000 --jobs 2 --output FILE`.

Each target runs in a process of its own, guided by coverage (atheris). It begins with the inputs in corpora.json; with --keep
what was found to reach new code is minimised into that file.
"""

import argparse
import base64
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from elastickv.benchmark.environment import environment
from tests.fuzz.command_line import TARGET as COMMAND_LINE
from tests.fuzz.targets import TARGETS

ALL = TARGETS | {"command-line": COMMAND_LINE}
CORPORA = Path(__file__).with_name("corpora.json")
MOST_KEPT = 40  # inputs of a target, the shortest of those that reach something of their own
_OPTIONS = ("-timeout=60", "-rss_limit_mb=4096", "-print_final_stats=1", "-len_control=20", "-verbosity=1")


def corpus(name: str) -> list[bytes]:
    """Return the inputs that a target begins with."""
    kept = json.loads(CORPORA.read_text(encoding="utf-8")) if CORPORA.exists() else {}
    return [*ALL[name].seeds, *map(base64.b85decode, kept.get(name, ()))]


def fuzz(name: str, amount: tuple[str, ...], folder: Path) -> dict:
    """Run one target and return what happened."""
    target, here = ALL[name], folder / name
    grown = here / "corpus"
    grown.mkdir(parents=True)
    for number, data in enumerate(corpus(name)):
        (grown / f"{number:05d}").write_bytes(data)
    words = here / "words"
    words.write_text("".join(f'"{word}"\n' for word in target.words), encoding="utf-8")
    report = here / "report.json"
    command = [sys.executable, "-m", "tests.fuzz.guided", name, str(report), *_OPTIONS, *amount, f"-max_len={target.longest}"]
    command += [*([f"-dict={words}"] if target.words else []), f"-artifact_prefix={here}/", str(grown)]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    took = time.monotonic() - start
    executions = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
    covered = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", done.stderr)
    told = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {"found": {}}
    broke = None if done.returncode == 0 else done.stderr.strip().splitlines()[-12:]
    result = {
        "executions": int(executions[1]) if executions else told.get("runs", 0),
        "seconds": round(took, 1),
        "per_second": round((int(executions[1]) if executions else told.get("runs", 0)) / took, 1),
        "refused_share": round(told.get("refused", 0) / max(1, told.get("runs", 0)), 4),
        "slowest_input_s": told.get("slowest_s"),
        "edges": int(covered[-1][0]) if covered else None,
        "features": int(covered[-1][1]) if covered else None,
        "corpus_inputs": int(covered[-1][2]) if covered else None,
        "findings": told["found"],
        "broke": broke,
    }
    print(name, {k: v for k, v in result.items() if k != "findings"}, *told["found"].items(), sep="\n   ", flush=True)
    return result


def minimised(name: str, folder: Path) -> list[str]:
    """Return the inputs of a grown corpus that reach something of their own, as base85."""
    least = folder / name / "least"
    least.mkdir()
    report = folder / name / "merge.json"
    command = [sys.executable, "-m", "tests.fuzz.guided", name, str(report), "-merge=1", "-rss_limit_mb=4096"]
    subprocess.run([*command, f"-max_len={ALL[name].longest}", str(least), str(folder / name / "corpus")], capture_output=True)
    found = sorted((path.read_bytes() for path in least.iterdir()), key=lambda data: (len(data), data))
    known = set(ALL[name].seeds)
    return [base64.b85encode(data).decode() for data in found if data not in known][:MOST_KEPT]


def main() -> int:
    """Fuzz; exit 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, help="executions of all parsers together; the command line gets a hundredth more")
    parser.add_argument("--seconds", type=int, help="at most, for each target")
    parser.add_argument("--only", nargs="*", choices=ALL, default=list(ALL))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="minimise what was found into corpora.json")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.runs is None and given.seconds is None:
        parser.error("give --runs or --seconds")
    shares = sum(target.share for target in TARGETS.values())

    def amount(name: str) -> tuple[str, ...]:
        limit = (f"-max_total_time={given.seconds}",) if given.seconds else ()
        if given.runs is None:
            return limit
        share = given.runs // 100 if name == "command-line" else given.runs * ALL[name].share // shares
        return (*limit, f"-runs={share}")

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.jobs) as pool:
        results = dict(zip(given.only, pool.map(lambda name: fuzz(name, amount(name), Path(folder)), given.only), strict=True))
        if given.keep:
            kept = json.loads(CORPORA.read_text(encoding="utf-8")) if CORPORA.exists() else {}
            kept |= dict(zip(given.only, pool.map(lambda name: minimised(name, Path(folder)), given.only), strict=True))
            CORPORA.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    record = {
        "date_utc": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": environment()["commit"],
        "python": platform.python_version(),
        "atheris": version("atheris"),
        "command": ["python", "-m", "tests.fuzz", *sys.argv[1:]],
        "executions_in_process": sum(r["executions"] for name, r in results.items() if name != "command-line"),
        "executions_command_line": results.get("command-line", {}).get("executions", 0),
        "targets": results,
    }
    if given.output:
        given.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    bad = [name for name, result in results.items() if result["findings"] or result["broke"]]
    print("findings in" if bad else "nothing was found", *bad)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
