"""Loading a model says how much of it is loaded, and shows none of the loaders' own bars."""

from importlib import import_module

import pytest

from elastickv.evaluation.loading_progress import loading_progress
from elastickv.transformers.model_loading import load_model
from tests.helpers.tiny_models import tiny_gguf


def test_the_tensors_of_a_gguf_file_are_counted(tmp_path, capfd):
    tqdm = import_module("tqdm.std").tqdm
    model = str(tiny_gguf(tmp_path / "tiny.gguf"))
    seen, display = [], tqdm.display
    with loading_progress(lambda *step: seen.append(step)):
        load_model(model)
    assert seen and all(0 <= done <= total for done, total in seen)
    assert seen[-1][0] == seen[-1][1] > 2
    assert tqdm.display is display
    assert "%" not in capfd.readouterr().err


def test_loaders_are_as_before_after_a_failure():
    tqdm, switches = import_module("tqdm.std").tqdm, import_module("transformers.utils.logging")
    before = tqdm.display, switches.disable_progress_bar
    with pytest.raises(RuntimeError, match="damaged"), loading_progress(lambda *_: None):
        raise RuntimeError("damaged")
    assert (tqdm.display, switches.disable_progress_bar) == before


def test_of_several_downloads_at_once_one_is_shown_to_its_end():
    tqdm, seen = import_module("tqdm.std").tqdm, []
    with loading_progress(lambda *step: seen.append(step)):
        large, small = tqdm(total=100), tqdm(total=10)
        for bar, done in ((large, 40), (small, 5), (large, 60), (small, 5)):
            bar.n += done
            bar.display()
        tqdm(iterable=[])
    assert seen == [(0, 100), (40, 100), (100, 100), (10, 10)]
