"""A result of the serving benchmark on the page: made-up figures of a made-up device."""

import copy
import json

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

import elastickv
from elastickv import UsageError
from tests.helpers.report_sections import rows as rows_of
from tests.helpers.report_sections import sections
from tests.helpers.serving_results import made_up_reads, made_up_serving


@pytest.fixture
def result():
    return made_up_serving()


@pytest.fixture
def section(result):
    return sections(elastickv.report(result))["serving"]


def rows(section, number):
    return rows_of(section["tables"][number])


def test_a_step_stands_with_its_ratio_to_the_baseline(section):
    dense, ours = rows(section, 0)
    assert (dense["a step"], dense["time / baseline"]) == ("8 ms", "")
    assert (ours["context × batch"], ours["a step"], ours["time / baseline"]) == ("4096 × 2", "6 ms", "0.750 [0.740, 0.760]")


def test_bytes_read_stand_with_their_ratio_and_the_share_of_anchors(result):
    result["contenders"][1]["steps"][0]["reads"] = made_up_reads()
    section = sections(elastickv.report(result))["serving"]
    (row,) = rows(section, 1)
    assert section["tables"][1]["caption"] == "Bytes of the KV cache that decode steps read"
    assert (row["cache"], row["context × batch"]) == ("elastickv_int4", "4096 × 2")
    assert (row["bytes a step"], row["dense 16 bit"], row["read 1/"]) == ("1.0 MiB", "8.0 MiB", "8.00")
    assert row["steps at anchors"] == "25.0%"


def test_a_result_without_bytes_read_has_no_such_table(section):
    assert len(section["tables"]) == 4 and not any("Bytes" in table["caption"] for table in section["tables"])


def test_bytes_read_that_are_none_are_refused_in_one_line(result):
    result["contenders"][1]["steps"][0]["reads"] = made_up_reads() | {"read_bytes": 0}
    with pytest.raises(UsageError, match=r"reads\.read_bytes") as caught:
        elastickv.report(result)
    assert "\n" not in str(caught.value)


def test_capacity_is_given_against_the_baselines(section):
    dense, ours = rows(section, 1)
    assert (dense["tokens"], dense["tokens / baseline"]) == ("100,000", "")
    assert (ours["tokens"], ours["tokens / baseline"]) == ("320,000", "3.20")


def test_throughput_start_up_and_first_token_are_shown(section):
    assert [row["tokens/s"] for row in rows(section, 2)] == ["1250.0", "1666.7"]
    start = rows(section, 3)[0]
    assert start["attention backend"] == "Backend (FlashAttention 3)"
    assert (start["start-up, s, by round"], start["CUDA graphs"], start["first token, s"]) == (
        "30.0, 20.0",
        "1.00 GiB",
        "1.500",
    )


def test_what_the_caches_held_is_said(section):
    note = "shape:made-up: weights are random, caches were filled with copies of one prompt's blocks, the baseline is bf16."
    assert section["notes"] == [note]


def test_the_headline_is_the_largest_saving_of_time(result):
    sentence = json.loads(elastickv.report(result).to_json())["headline"]["sentence"]
    assert sentence.startswith(
        "On a made-up device, vLLM 0.0, shape:made-up, 2 requests of 4096 tokens decode with elastickv_int4"
    )
    assert "0.750 [0.740, 0.760] of the time of bf16" in sentence


def test_what_was_not_measured_is_a_warning(result):
    result["contenders"][1]["failures"] = ["round 1: exit status 1: no kernel"]
    said = json.dumps(sections(elastickv.report(result))["warnings"])
    assert "repetition dropped" in said and "elastickv_int4, round 1: exit status 1: no kernel" in said


def test_contenders_that_never_started_leave_the_others_on_the_page(result):
    result["contenders"][1] |= {"steps": [], "capacity": [], "throughput": None, "first_token": None, "startup_s": []}
    section = sections(elastickv.report(result))["serving"]
    assert [row["cache"] for row in rows(section, 0)] == ["bf16"]
    assert "no step was timed beside the baseline" in json.loads(elastickv.report(result).to_json())["headline"]["sentence"]


def test_the_same_result_counts_once(result):
    page = json.loads(elastickv.report(result, copy.deepcopy(result)).to_json())
    assert len(page["rows"]) == 2 and "counts once" in page["notes"][0]


def test_steps_are_rows_of_the_page(result):
    ours = json.loads(elastickv.report(result).to_json())["rows"][1]
    assert (ours["kind"], ours["cache"], ours["ms"], ours["batch"]) == ("serving step", "elastickv_int4", 6.0, 2)


@pytest.mark.parametrize(("change", "reason"), [({"version": 9}, "is of version 9"), ({"contenders": None}, "contenders")])
def test_a_result_that_is_none_is_refused_in_one_line(result, change, reason):
    with pytest.raises(UsageError, match=reason) as caught:
        elastickv.report(result | change)
    assert "\n" not in str(caught.value)


def test_a_comparison_says_that_it_has_no_use_for_it(result):
    with pytest.raises(UsageError, match="give a result of `elastickv bench`"):
        elastickv.compare(result, result)
