"""Under which licences is what ElasticKV installs? A table of the packages that its extras pull in here, and a check.

    python tools/licences.py              # what `pip install elastickv` brings
    python tools/licences.py --extras transformers report test

Exit code 1 if a package's licence is not among the permitted ones, or is not told. Reads what is installed; asks no one.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Permissive, or weak copyleft of files that are used as they are.
PERMITTED = {
    "0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "ISC", "MIT", "MIT-CMU",
    "MPL-2.0", "PSF-2.0", "Unlicense", "Zlib",
}  # fmt: skip
# Of CUDA: redistributable under NVIDIA's terms, and only in the extras that say so.
NVIDIA = "LicenseRef-NVIDIA-Proprietary"
# As packages write it that give no SPDX expression.
MEANT = {
    "apache": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "bsd": "BSD-3-Clause",
    "bsd license": "BSD-3-Clause",
    "isc license": "ISC",
    "isc license (iscl)": "ISC",
    "mit license": "MIT",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "python software foundation license": "PSF-2.0",
}
# Of packages whose metadata tells none: as their repository has it.
TOLD_ELSEWHERE = {"atheris": "Apache-2.0"}
ITSELF = "elastickv"


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required(extras: list[str]) -> list[str]:
    """Return what pyproject.toml requires, with these extras."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts: list[str] = list(project["dependencies"])
    for extra in extras:
        texts += project["optional-dependencies"][extra]
    return texts


def closure(extras: list[str]) -> list[str]:
    """Return the installed packages that ElasticKV with `extras` requires, directly or not."""
    from packaging.requirements import Requirement  # pytest brings it

    wanted: dict[str, set[str]] = {}

    def walk(texts: list[str], of_extras: set[str]) -> None:
        for requirement in map(Requirement, texts):
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in of_extras):
                take(requirement.name, {"", *requirement.extras})

    def take(name: str, of_extras: set[str]) -> None:
        key = normalised(name)
        if key == ITSELF:
            walk(required(sorted(of_extras - {""})), {""})
        elif not of_extras <= wanted.get(key, set()):
            try:
                requires = metadata.distribution(name).requires or []
            except metadata.PackageNotFoundError:
                return  # of another platform, or of an extra that excludes one that is here
            wanted[key] = wanted.get(key, set()) | of_extras
            walk(requires, wanted[key])

    take(ITSELF, {"", *extras})
    return sorted(wanted)


def licence(name: str) -> str:
    """Return a package's licence as an SPDX expression; empty where it tells none that is known."""
    told = metadata.metadata(name)
    expressions = told.get_all("License-Expression") or []
    if expressions:
        return str(expressions[0])
    classifiers = [text.rpartition(" :: ")[2] for text in told.get_all("Classifier") or [] if text.startswith("License ::")]
    for candidate in (*(text.strip() for text in told.get_all("License") or []), *classifiers):
        if not _refused(candidate):
            return str(candidate)
        if candidate.lower() in MEANT:
            return MEANT[candidate.lower()]
    return TOLD_ELSEWHERE.get(name, "")


def _refused(expression: str) -> list[str]:
    """Return the terms of an SPDX expression that are not permitted (of alternatives, all of them are asked for)."""
    plain = re.sub(r"\s+WITH\s+LLVM-exception", "", expression)
    terms = [term.strip(" ()") for term in re.split(r"\s+(?:AND|OR)\s+", plain)]
    return [term for term in terms if term not in PERMITTED | {NVIDIA}]


def rows(extras: list[str]) -> Iterator[tuple[str, str, str, bool]]:
    """Yield name, version, licence and whether it is permitted."""
    for name in closure(extras):
        spdx = licence(name)
        nvidia = NVIDIA not in spdx or name.startswith("nvidia-")
        yield name, metadata.version(name), spdx, bool(spdx) and not _refused(spdx) and nvidia


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--extras", nargs="*", default=[], help="of ElasticKV")
    table = list(rows(parser.parse_args().extras))
    for name, version, spdx, permitted in table:
        print(f"{name:28} {version:16} {spdx or 'not told'}{'' if permitted else '   <- not permitted'}")
    return 0 if all(row[3] for row in table) else 1


if __name__ == "__main__":
    sys.exit(main())
