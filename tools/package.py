"""Check the wheel and the sdist: reproducible, complete, and the tests pass from the installed wheel.

    python3 tools/package.py                       # everything; installs the test tools, takes minutes
    python3 tools/package.py --no-install          # build and compare only
    python3 tools/package.py tests/recipe          # run only these tests

Clones the checked-out commit into two folders with different names, one under a stricter umask, and builds both with
SOURCE_DATE_EPOCH at the commit's time; builds the wheel once more from the sdist. All must be identical, byte by byte. The
tests run from the unpacked sdist without its `src` in a fresh environment, so that they import the wheel.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from check import ROOT, fresh_environment

# Tests of the checkout itself: its layout, its documents and its results.
OF_THE_CHECKOUT = (
    "tests/test_architecture.py", "tests/test_documents.py", "tests/test_error_texts.py", "tests/test_supply.py",
    "tests/benchmark_scripts",
)  # fmt: skip
WHERE = "import elastickv, pathlib; print(pathlib.Path(elastickv.__file__).parent)"


def output_of(command: list[str], **rest: object) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **rest).stdout.strip()  # type: ignore[call-overload, no-any-return]


def build(python: Path, source: Path, out: Path, *targets: str) -> dict[str, Path]:
    """Return name -> file of the distributions that hatchling builds from `source`."""
    time = output_of(["git", "-C", str(ROOT), "log", "-1", "--format=%ct"])
    command = [str(python), "-m", "hatchling", "build", "-d", str(out)]
    for target in targets:
        command += ["-t", target]
    subprocess.run(command, cwd=source, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"SOURCE_DATE_EPOCH": time})
    return {path.name: path for path in out.iterdir()}


def digests(files: dict[str, Path]) -> dict[str, str]:
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(files.items())}


def built(python: Path, folder: Path) -> dict[str, Path]:
    """Return the wheel and the sdist, built in two folders and once more from the sdist.

    Raises
    ------
    SystemExit : if they differ; names the files that do.
    """
    files: list[dict[str, Path]] = []
    for name, umask in (("here", 0o022), ("elsewhere/with a space", 0o077)):
        before = os.umask(umask)
        output_of(["git", "clone", "--quiet", str(ROOT), str(folder / name)])
        files.append(build(python, folder / name, folder / f"out-{len(files)}", "sdist", "wheel"))
        os.umask(before)
    sdist = next(path for name, path in files[0].items() if name.endswith(".tar.gz"))
    unpacked = unpack(sdist, folder / "unpacked")
    files.append({**build(python, unpacked, folder / "out-2", "wheel"), sdist.name: sdist})
    first = digests(files[0])
    for others in map(digests, files[1:]):
        differ = [name for name in first | others if first.get(name) != others.get(name)]
        if differ:
            sys.exit(f"not reproducible: {', '.join(differ)}")
    for name, digest in first.items():
        print(f"    {name}: identical three times, sha256 {digest}")
    return files[0]


def unpack(sdist: Path, folder: Path) -> Path:
    with tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extractall(folder, filter="data")
        else:
            archive.extractall(folder)
    return next(folder.iterdir())


def missing(files: dict[str, Path]) -> list[str]:
    """Return the tracked files under src (kernels, sample, schemas and py.typed among them) that a distribution lacks."""
    tracked = output_of(["git", "-C", str(ROOT), "ls-files", "src/elastickv"]).splitlines()
    lacks = []
    for name, path in files.items():
        if name.endswith(".whl"):
            with zipfile.ZipFile(path) as wheel:
                held = {f"src/{entry}" for entry in wheel.namelist()}
        else:
            with tarfile.open(path) as sdist:
                held = {entry.partition("/")[2] for entry in sdist.getnames()}
        lacks += [f"{name}: {entry}" for entry in tracked if entry not in held]
    return lacks


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--no-install", action="store_true", help="build and compare only")
    parser.add_argument("--extra", default="test", help="of the wheel, installed with it (default: test)")
    parser.add_argument("tests", nargs="*", default=["tests"])
    options = parser.parse_args()
    requires = re.search(r'^requires = \["([^"]+)"\]', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert requires
    with tempfile.TemporaryDirectory(prefix="elastickv-package-") as name:
        folder = Path(name)
        builder = fresh_environment(folder / "builder")
        subprocess.run([str(builder), "-m", "pip", "install", "--quiet", requires[1]], check=True)
        print(f"==> build: {requires[1]}", flush=True)
        files = built(builder, folder)
        lacks = missing(files)
        if lacks:
            sys.exit("missing:\n" + "\n".join(lacks))
        print("    both contain every tracked file of the package", flush=True)
        if options.no_install:
            return 0
        wheel = next(path for name, path in files.items() if name.endswith(".whl"))
        tests = unpack(next(path for name, path in files.items() if name.endswith(".tar.gz")), folder / "tests")
        shutil.rmtree(tests / "src")
        print(f"==> install: {wheel.name}[{options.extra}]", flush=True)
        python = fresh_environment(folder / "environment")
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", f"{wheel}[{options.extra}]"], check=True)
        clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        where = output_of([str(python), "-c", WHERE], cwd=tests, env=clean)
        print(f"==> tests of {where}", flush=True)
        if "site-packages" not in where:
            sys.exit("the tests would not import the installed package")
        ignored = [f"--ignore={entry}" for entry in OF_THE_CHECKOUT]
        command = [str(python), "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", *ignored, *options.tests]
        return subprocess.call(command, cwd=tests, env=clean)


if __name__ == "__main__":
    sys.exit(main())
