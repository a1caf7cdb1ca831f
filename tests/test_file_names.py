"""Whatever is given as the name of a file, the answer is one line."""

from pathlib import Path

import pytest

import elastickv
from elastickv import UsageError
from elastickv.benchmark.sample_inputs import load_sample
from elastickv.evaluation.texts import read_text
from elastickv.model_benchmark.gguf_file import read_gguf
from elastickv.recipe import ModelCalibration
from elastickv.results.files import check_writable, write_text
from elastickv.results.measurement import Measurement
from elastickv.sweeps.plan import read_plan
from elastickv.sweeps.sweep_result import Sweep
from tests.helpers.names import TEXTS, files

READERS = {
    "calibration": ModelCalibration.load,
    "result": Measurement.load,
    "sweep": Sweep.load,
    "load": elastickv.load,
    "report": elastickv.report,
    "compare": lambda name: elastickv.compare(name, name),
    "input": load_sample,
    "text": lambda name: read_text(Path(name)),
    "plan": lambda name: read_plan(Path(name)),
    "gguf": lambda name: read_gguf(str(name)),
}


def refused(call):
    with pytest.raises(UsageError) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_name_that_no_file_has_is_refused_in_one_line(reader, name):
    refused(lambda: reader(name))


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_path_that_leads_to_no_readable_file_is_refused_in_one_line(reader, tmp_path):
    for path in files(tmp_path):
        refused(lambda: reader(path))  # noqa: B023


@pytest.mark.parametrize("name", ["a long name", "a zero byte", "half a character", "the root"])
@pytest.mark.parametrize("write", [check_writable, lambda path: write_text(path, "text")], ids=["check", "write"])
def test_a_name_that_no_file_can_have_is_not_written(write, name):
    refused(lambda: write(Path(TEXTS[name])))


@pytest.mark.parametrize("value", [3, None, b"a"])
@pytest.mark.parametrize(
    "reader", [ModelCalibration.load, Measurement.load, Sweep.load], ids=["calibration", "result", "sweep"]
)
def test_what_is_no_name_is_refused_in_one_line(reader, value):
    refused(lambda: reader(value))
