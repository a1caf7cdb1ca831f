"""A result of the soak on the page: made-up figures of a made-up device."""

import copy
import json

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

import elastickv
from elastickv import UsageError
from tests.helpers.report_sections import sections
from tests.helpers.serving_results import made_up_serving, made_up_soak
from tests.html_report.test_serving_section import rows


@pytest.fixture
def section():
    return sections(elastickv.report(made_up_soak()))["serving"]


def test_what_was_asked_stands_with_what_it_was_judged_by(section):
    kept, failed, unknown = rows(section, 0)
    assert (kept["asked"], kept["holds"], kept["figures"]) == ("ours: memory does not grow", "yes", "0")
    assert (failed["holds"], failed["figures"]) == ("no", "kl 0.25, of 0.125, requests 50")
    assert (unknown["holds"], unknown["figures"]) == ("not measured", "")


def test_each_backend_stands_with_what_it_did(section):
    ours, stock = rows(section, 1)
    assert (ours["steps"], ours["preemptions"], ours["decode step, ms"], ours["p99.9 / median"]) == (
        "5000",
        "12",
        "4.00",
        "2.25",
    )
    assert ours["KL, soak"] == "1.25e-03" and "KL, alone" not in ours
    assert (stock["backend"], stock["steps"]) == ("stock", "")


def test_a_backend_that_failed_is_a_warning():
    assert "stock: not done after 9 s" in json.dumps(sections(elastickv.report(made_up_soak()))["warnings"])


def test_the_headline_counts_what_holds_unless_speed_was_measured():
    headlines = [
        json.loads(elastickv.report(*results).to_json())["headline"]["sentence"]
        for results in ([made_up_soak()], [made_up_soak(), made_up_serving()])
    ]
    assert headlines[0] == "On a made-up device, 1 of 2 things hold that were asked of vLLM under a random load."
    assert "of the time of bf16" in headlines[1]


def test_the_same_soak_counts_once():
    page = json.loads(elastickv.report(made_up_soak(), copy.deepcopy(made_up_soak())).to_json())
    assert "counts once" in page["notes"][0]


@pytest.mark.parametrize(("change", "reason"), [({"version": 9}, "is of version 9"), ({"verdicts": None}, "verdicts")])
def test_a_soak_that_is_none_is_refused_in_one_line(change, reason):
    with pytest.raises(UsageError, match=reason) as caught:
        elastickv.report(made_up_soak() | change)
    assert "\n" not in str(caught.value)
