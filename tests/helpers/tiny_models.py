"""Models of a few thousand weights, with a tokenizer of characters. Nothing is downloaded."""

from types import SimpleNamespace

from elastickv.transformers.model_loading import Loaded


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


def tiny_gguf(path, positions=2048, heads=2, kv_heads=1, head_dim=64, layers=2, seed=0, tokenizer=None, **fields):
    """Write a random Llama of about a megabyte whose tokens are bytes; return its path.

    `tokenizer` are settings such as {"add_bos_token": False}.
    """
    import gguf
    import numpy as np

    hidden, inner, rng = heads * head_dim, 192, np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(positions)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head_dim)
    for key, value in fields.items():
        writer.add_uint32(f"llama.{key.replace('__', '.')}", value)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in ({"add_space_prefix": False} | (tokenizer or {})).items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)

    def weight(name, *shape):
        writer.add_tensor(name, (0.3 * rng.standard_normal(shape)).astype(np.float32))

    weight("token_embd.weight", len(tokens), hidden)
    weight("output.weight", len(tokens), hidden)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(hidden, np.float32))
        weight(f"blk.{layer}.attn_q.weight", hidden, hidden)
        weight(f"blk.{layer}.attn_k.weight", kv_heads * head_dim, hidden)
        weight(f"blk.{layer}.attn_v.weight", kv_heads * head_dim, hidden)
        weight(f"blk.{layer}.attn_output.weight", hidden, hidden)
        weight(f"blk.{layer}.ffn_gate.weight", inner, hidden)
        weight(f"blk.{layer}.ffn_up.weight", inner, hidden)
        weight(f"blk.{layer}.ffn_down.weight", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def framing_tokenizer(before=(), after=(), vocabulary=128):
    """A tokenizer of Transformers, one token a character, that puts the special tokens `before` and `after` around a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"<s>": 1, "</s>": 2, "<lang>": 3, "<unk>": 0}
    letters = {chr(i): i for i in range(len(special), vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(special | letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    if before or after:
        template = [*before, "$A", *after]
        named = [(token, special[token]) for token in (*before, *after)]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=named)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<lang>"]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


FRAMES = {
    "none": ((), ()),
    "beginning": (("<s>",), ()),
    "beginning and end": (("<s>",), ("</s>",)),
    "end": ((), ("</s>",)),
    "two and an end": (("<s>", "<lang>"), ("</s>",)),
}
