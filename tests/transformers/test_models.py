"""Load a model by name."""

import struct
import sys

import transformers

from elastickv.transformers.model_loading import load_model
from tests.helpers.tiny_models import tiny_llama


def test_a_gguf_file_is_read_without_a_word_and_the_model_is_named_after_it(tmp_path, monkeypatch, capsys):
    file = tmp_path / "Some-1B.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))

    def loading(folder, **options):
        print("Converting and de-quantizing: 50%", file=sys.stderr)
        model = tiny_llama().model
        model.config.name_or_path = folder
        return model

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loading)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda folder, **options: None)
    loaded = load_model(str(file))
    assert loaded.name == "Some-1B.gguf" and loaded.model.config.name_or_path == str(file)
    assert capsys.readouterr().err == ""
