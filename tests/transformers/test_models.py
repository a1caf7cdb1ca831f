"""Load a model by name."""

import struct
import sys

import pytest
import transformers

from elastickv.errors import UsageError
from elastickv.transformers.model_loading import fingerprint, load_model
from elastickv.vllm.checkpoint_fingerprint import checkpoint_fingerprint
from tests.helpers.tiny_models import tiny_gguf, tiny_llama


def test_a_gguf_file_is_read_without_a_word_and_the_model_is_named_after_it(tmp_path, monkeypatch, capsys):
    file = tmp_path / "Some-1B.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))

    def loading(folder, **options):
        print("Converting and de-quantizing: 50%", file=sys.stderr)
        model = tiny_llama().model
        model.config.name_or_path = folder
        return model

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda folder, **options: tiny_llama().model.config)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loading)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda folder, **options: None)
    loaded = load_model(str(file))
    assert loaded.name == "Some-1B.gguf" and loaded.model.config.name_or_path == str(file)
    assert capsys.readouterr().err == ""


def test_a_gguf_file_is_parsed_once_and_gives_the_weights_that_transformers_gives(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    file = tiny_gguf(tmp_path / "m.gguf")
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype="float32")
    opened = []

    class Counting(gguf.GGUFReader):
        def __init__(self, path, *arguments):
            opened.append(path)
            super().__init__(path, *arguments)

    monkeypatch.setattr(gguf, "GGUFReader", Counting)
    maps = gguf.get_tensor_name_map
    loaded = load_model(str(file))
    assert len(opened) == 1
    assert gguf.GGUFReader is Counting and gguf.get_tensor_name_map is maps
    theirs = expected.state_dict()
    assert all(weight.equal(theirs[name]) for name, weight in loaded.model.state_dict().items())
    assert loaded.tokenizer.decode([3 + byte for byte in b"text"]) == "text"


def test_a_gguf_file_is_saved_as_a_folder_of_the_same_model(tmp_path):
    pytest.importorskip("gguf")
    loaded = load_model(str(tiny_gguf(tmp_path / "m.gguf")))
    loaded.save(tmp_path / "folder")
    folder = load_model(str(tmp_path / "folder"))
    assert fingerprint(folder.model) == fingerprint(loaded.model)
    assert all(weight.equal(folder.model.state_dict()[name]) for name, weight in loaded.model.state_dict().items())
    assert folder.tokenizer("text").input_ids == loaded.tokenizer("text").input_ids
    assert checkpoint_fingerprint(tmp_path / "folder", folder.model.config) == fingerprint(loaded.model)


def test_a_device_that_does_not_exist_is_refused_before_the_model_is_read(tmp_path):
    tiny_llama().model.save_pretrained(tmp_path)
    for device in ("tpu", "cuda:9999", "cpu:1", "cuda:\u00b2", "a\udcffb"):
        with pytest.raises(UsageError, match="`device`="):
            load_model(str(tmp_path), device=device)
