"""Streamed text is the decode of all tokens at once, for every style of tokenizer and any split of characters over tokens."""

import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from elastickv.cli.detokenizer import IncrementalDetokenizer
from elastickv.cli.streaming import LiveText

SPECIAL = "<|end|>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["\u2581", "\u2581the", "\u2581\u2581", "the", "\u2581a", "\u4f60", "e\u0301", "\U0001f600", ".", "\n", "\ufffd", "'"]
PIECES = ["the", "##s", "##\u00e9", ".", "'", "s", "n", "t", "##'t", "m", "do", "n't", "re", "!", " ", "##", "ve"]


def byte_level_tokens():
    """Return every byte, and tokens that begin or end in the middle of a character, as byte-level BPE writes them."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = [byte for byte in range(256) if chr(byte).isprintable() and byte not in (0x20, 0xA0, 0xAD)]
    bytes_ += [byte for byte in range(256) if byte not in bytes_]
    letter = dict(zip(bytes_, letters, strict=True))
    longer = [" the", " a", "\u4f60\u597d", "\U0001f600", " \ufffd", "\n\n"]
    cut = [text.encode()[start:end] for text in longer for start, end in ((0, None), (0, -1), (1, None))]
    return list(dict.fromkeys("".join(letter[byte] for byte in part) for part in [*map(bytes, zip(range(256))), *cut]))


def styles():
    """Return style -> (tokens, decoder, model)."""
    from tokenizers import decoders

    fallback = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    return {
        "llama 2": ([*WORDS, *BYTES], decoders.Sequence([*fallback, decoders.Strip(" ", 1, 0)])),
        "gemma": ([*WORDS, *BYTES], decoders.Sequence(fallback)),
        "metaspace": (WORDS, decoders.Metaspace()),
        "byte level": (byte_level_tokens(), decoders.ByteLevel()),
        "word piece": (PIECES, decoders.WordPiece(cleanup=False)),
        "word piece, its own clean-up": (PIECES, decoders.WordPiece(cleanup=True)),
        "end of word": (["the</w>", "a", ".</w>", "\u4f60", "</w>"], decoders.BPEDecoder()),
        "none": (["the", "a ", " .", "'"], None),
    }


@pytest.fixture(scope="module", params=[(style, clean_up) for style in styles() for clean_up in (False, True)], ids=str)
def tokenizer(request):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    style, clean_up = request.param
    tokens, decoder = styles()[style]
    made = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token=tokens[0]))
    if decoder is not None:
        made.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=SPECIAL, clean_up_tokenization_spaces=clean_up)


def streamed(tokenizer, ids):
    detokenizer = IncrementalDetokenizer(tokenizer)
    return [*map(detokenizer.add, ids), detokenizer.end()]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_pieces_are_the_whole(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=40) | st.lists(st.integers(0, 16), max_size=200))
    ids = [number % len(tokenizer) for number in ids]
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60) | st.text("the \n.'\u4f60\U0001f600", max_size=60))
@example("\n the\n  a\n\n the")
def test_a_text_streams_as_it_was_whatever_its_bytes_are_split_into(text):
    """Of tokenizers that have a token for every byte; a text's first space is the one that Llama 2 adds and strips."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    for style, prefix in (("llama 2", b" "), ("gemma", b""), ("byte level", b"")):
        tokens, decoder = styles()[style]
        made = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token=tokens[0]))
        made.decoder = decoder
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
        first = tokens.index("<0x00>") if "<0x00>" in tokens else 0
        ids = [first + byte for byte in prefix + text.encode()]
        assert "".join(streamed(tokenizer, ids)) == text


def test_a_space_after_a_newline_and_after_a_special_token_stays():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokens, decoder = styles()["llama 2"]
    made = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token=tokens[0]))
    made.decoder = decoder
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=SPECIAL)
    the, newline, special = tokens.index("\u2581the"), tokens.index("<0x0A>"), len(tokens)
    assert streamed(tokenizer, [the, newline, the, special, the]) == ["the", "", "\n the", "", " the", ""]


def test_a_token_costs_the_same_however_long_the_text_is():
    class Counting:
        most = 0

        def decode(self, ids, **_):
            self.most = max(self.most, len(ids))
            return "".join(chr(32 + number % 90) for number in ids)

    tokenizer = Counting()
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.add(number) for number in range(2000)]
    assert "".join(pieces) == tokenizer.decode(range(2000))[: sum(map(len, pieces))]
    tokenizer.most = 0
    for number in range(2000):
        detokenizer.add(number)
    assert tokenizer.most <= 65


class _Rewriting:
    """A tokenizer whose later tokens change what earlier ones are decoded to."""

    def decode(self, ids, **_):
        return "ab"[: len(ids)] if len(ids) < 3 else "xyz"


@pytest.mark.parametrize("keep_going", [False, True])
def test_what_was_written_stays_and_the_text_is_the_decode_of_all_tokens(capsys, keep_going):
    import torch

    with LiveText(_Rewriting(), keep_going) as live:
        for number in range(3):
            live.add(torch.tensor([number]))
    assert live.text == "xyz"
    assert capsys.readouterr().out == "abz\n"


class _Full:
    """A standard output whose disk is full."""

    encoding = "utf-8"

    def write(self, text):
        raise OSError(28, "No space left on device")

    def flush(self):
        pass

    def isatty(self):
        return False

    def fileno(self):
        raise OSError


def test_a_text_that_cannot_be_written_goes_on_if_it_is_saved(monkeypatch):
    import torch

    monkeypatch.setattr(sys, "stdout", _Full())
    with LiveText(_Rewriting(), keep_going=True) as live:
        for number in range(2):
            live.add(torch.tensor([number]))
    assert live.text == "ab" and live.error.errno == 28
    with pytest.raises(OSError, match="No space"), LiveText(_Rewriting()) as live:
        live.add(torch.tensor([0]))
