"""List the licenses of the packages that ElasticKV and its extras install, and check that they are permitted.

    python tools/licenses.py              # of `pip install elastickv`
    python tools/licenses.py --extras transformers report test

Exit code 1 if a package's license is unknown or not permitted. Reads the installed packages' metadata; works offline.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Permissive, or weak copyleft of unchanged files.
PERMITTED = {
    "0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "ISC", "MIT", "MIT-CMU",
    "MPL-2.0", "PSF-2.0", "Unlicense", "Zlib",
}  # fmt: skip
# Of the CUDA wheels, which are redistributable under NVIDIA's terms; only in the extras for CUDA.
NVIDIA = "LicenseRef-NVIDIA-Proprietary"
# Licenses of packages that give no SPDX expression.
SPDX_OF = {
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
# Of packages without a license in their metadata: the one of their repository.
FROM_REPOSITORY = {"atheris": "Apache-2.0"}
ITSELF = "elastickv"


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required(extras: list[str]) -> list[str]:
    """Return the requirements in pyproject.toml, with these extras."""
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

    extras_of: dict[str, set[str]] = {}

    def walk(texts: list[str], of_extras: set[str]) -> None:
        for requirement in map(Requirement, texts):
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in of_extras):
                take(requirement.name, {"", *requirement.extras})

    def take(name: str, of_extras: set[str]) -> None:
        key = normalized(name)
        if key == ITSELF:
            walk(required(sorted(of_extras - {""})), {""})
        elif not of_extras <= extras_of.get(key, set()):
            try:
                requires = metadata.distribution(name).requires or []
            except metadata.PackageNotFoundError:
                return  # of another platform, or of an extra that excludes one that is here
            extras_of[key] = extras_of.get(key, set()) | of_extras
            walk(requires, extras_of[key])

    take(ITSELF, {"", *extras})
    return sorted(extras_of)


def license_of(name: str) -> str:
    """Return a package's license as an SPDX expression; empty if it is unknown."""
    fields = metadata.metadata(name)
    expressions = fields.get_all("License-Expression") or []
    if expressions:
        return str(expressions[0])
    classifiers = [text.rpartition(" :: ")[2] for text in fields.get_all("Classifier") or [] if text.startswith("License ::")]
    for candidate in (*(text.strip() for text in fields.get_all("License") or []), *classifiers):
        if not _refused(candidate):
            return str(candidate)
        if candidate.lower() in SPDX_OF:
            return SPDX_OF[candidate.lower()]
    return FROM_REPOSITORY.get(name, "")


def _refused(expression: str) -> list[str]:
    """Return the terms of an SPDX expression that are not permitted; of alternatives, all must be."""
    plain = re.sub(r"\s+WITH\s+LLVM-exception", "", expression)
    terms = [term.strip(" ()") for term in re.split(r"\s+(?:AND|OR)\s+", plain)]
    return [term for term in terms if term not in PERMITTED | {NVIDIA}]


def rows(extras: list[str]) -> Iterator[tuple[str, str, str, bool]]:
    """Yield name, version, license and whether it is permitted."""
    for name in closure(extras):
        spdx = license_of(name)
        nvidia = NVIDIA not in spdx or name.startswith("nvidia-")
        yield name, metadata.version(name), spdx, bool(spdx) and not _refused(spdx) and nvidia


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--extras", nargs="*", default=[], help="of ElasticKV")
    table = list(rows(parser.parse_args().extras))
    for name, version, spdx, permitted in table:
        print(f"{name:28} {version:16} {spdx or 'unknown'}{'' if permitted else '   <- not permitted'}")
    return 0 if all(row[3] for row in table) else 1


if __name__ == "__main__":
    sys.exit(main())
