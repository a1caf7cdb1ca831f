"""What the tests of commands that load a model share."""

import io
import sys
from types import SimpleNamespace

import pytest

from elastickv.cli import main
from tests.helpers.tiny_models import TEXT, tiny_llama


@pytest.fixture
def elastickv(monkeypatch, capsys):
    """Run the program in this process: a new one would import PyTorch anew."""

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["elastickv", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8"))
        with pytest.raises(SystemExit) as stop:
            main()
        shown = capsys.readouterr()
        return SimpleNamespace(returncode=stop.value.code, stdout=shown.out, stderr=shown.err)

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder as Transformers writes it, its tokenizer one token a character with a chat template; texts beside it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama().model.save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token="\x00"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="\x00")
    whole.chat_template = "{% for message in messages %}<{{ message.content }}>{% endfor %}"
    whole.save_pretrained(path)
    (path.parent / "text.txt").write_text(TEXT, encoding="utf-8")
    (path.parent / "other.txt").write_text(TEXT[::-1], encoding="utf-8")
    return path
