"""What the tests of the page share: it is drawn once."""

import warnings

import pytest

from tests.helpers.results import COMMITTED


@pytest.fixture(scope="session")
def h100():
    """The report of the committed results of the H100."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    from elastickv import report

    with warnings.catch_warnings():  # files that are no results lie among them
        warnings.simplefilter("ignore", UserWarning)
        return report(COMMITTED / "h100")
