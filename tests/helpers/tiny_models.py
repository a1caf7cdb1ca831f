"""Models of a few thousand weights, with a tokenizer that maps characters: nothing is downloaded."""

from types import SimpleNamespace

from elastickv.transformers.models import Loaded


class CharacterTokenizer:
    """One token a character; what `eval` and `calibrate` need of a tokenizer."""

    eos_token_id = None
    bos_token_id = None

    def __init__(self, vocabulary):
        self.vocabulary = vocabulary

    def __call__(self, text, **_):
        return SimpleNamespace(input_ids=[ord(c) % self.vocabulary for c in text])

    def decode(self, ids, **_):
        return "".join(chr(int(i)) for i in ids)


def tiny_llama(seed=0, layers=2, **sizes):
    """A Llama with random weights, large enough for its attention to prefer some tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "vocab_size": 128,
        "max_position_embeddings": 4096,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    model = LlamaForCausalLM(LlamaConfig(**(settings | sizes))).eval()
    return Loaded("tiny", model, CharacterTokenizer(128))


TEXT = "".join(chr(32 + (i * i * 7 + i // 3) % 90) for i in range(6000))
