"""The matrix, where its interpreters are: `nox`, or one session, `nox -s quick-3.13`. Without nox: tools/check.py."""

import nox

from tools.check import QUICK, SHORT_RUN

PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
nox.options.sessions = ["quick", "licences"]
nox.options.error_on_missing_interpreters = False


@nox.session(python=PYTHONS)
def quick(session: nox.Session) -> None:
    """The part of the tests that another Python could change, and a short run."""
    session.install(".", "pytest", "hypothesis", "jsonschema")
    session.run("pytest", "-q", *QUICK)
    session.run("elastickv", *SHORT_RUN)


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """All tests; `-- PATH` for some."""
    session.install(".[test]")
    session.run("pytest", "-q", "-n", "2", "--dist", "loadfile", *session.posargs)


@nox.session
def licences(session: nox.Session) -> None:
    """Licences of everything that the package and its extras install."""
    session.install(".[transformers,cuda,report]", "packaging")
    session.run("python", "tools/licences.py", "--extras", "transformers", "cuda", "report")


@nox.session
def audit(session: nox.Session) -> None:
    """Known vulnerabilities of what is installed with the package; asks PyPI."""
    session.install(".[transformers,report]", "pip-audit")
    session.run("pip-audit", "--skip-editable", *session.posargs)


@nox.session
def package(session: nox.Session) -> None:
    """Wheel and sdist: reproducible, complete, and the tests pass from the wheel."""
    session.run("python", "tools/package.py", *session.posargs)
