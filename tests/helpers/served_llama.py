"""A Llama with random weights in a folder, as a serving engine loads it: no tokenizer, or one of a few hundred words."""

import json
import math
from dataclasses import dataclass

WORDS = 500
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"


@dataclass(frozen=True)
class Sizes:
    """Sizes of a Llama. Queries and keys are large: attention prefers a few tokens, and a wrong read changes the answer."""

    layers: int = 2
    hidden: int = 256
    inner: int = 384
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    vocabulary: int = 512
    positions: int = 4096
    theta: float = 10000.0
    epsilon: float = 1e-5


def random_weights(sizes=None, seed=0, peak=2.0):
    """Return the tensors of the model by the names of its file, float32. `peak` is the size of queries and of keys."""
    import torch

    sizes = sizes or Sizes()
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows, columns, size):
        return torch.randn(rows, columns, generator=generator) * (size / math.sqrt(columns))

    hidden, queries, keys = sizes.hidden, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    weights = {
        "model.embed_tokens.weight": torch.randn(sizes.vocabulary, hidden, generator=generator),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": matrix(sizes.vocabulary, hidden, 3.0),
    }
    for layer in range(sizes.layers):
        parts = {
            "self_attn.q_proj": matrix(queries, hidden, peak),
            "self_attn.k_proj": matrix(keys, hidden, peak),
            "self_attn.v_proj": matrix(keys, hidden, 1.0),
            "self_attn.o_proj": matrix(hidden, queries, 2.0),
            "mlp.gate_proj": matrix(sizes.inner, hidden, 1.0),
            "mlp.up_proj": matrix(sizes.inner, hidden, 1.0),
            "mlp.down_proj": matrix(hidden, sizes.inner, 1.0),
            "input_layernorm": 1 + torch.randn(hidden, generator=generator) * 0.1,
            "post_attention_layernorm": 1 + torch.randn(hidden, generator=generator) * 0.1,
        }
        weights |= {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in parts.items()}
    return weights


def write_model(folder, weights, sizes=None, tokenizer=False):
    """Write `config.json` and `model.safetensors`, and the files of a tokenizer; return the folder."""
    from safetensors.torch import save_file

    sizes = sizes or Sizes()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "vocab_size": sizes.vocabulary,
        "max_position_embeddings": sizes.positions,
        "rope_theta": sizes.theta,
        "rms_norm_eps": sizes.epsilon,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": "float32",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    if tokenizer:
        write_tokenizer(folder)
    return folder


def write_adapter(folder, weights, rank, layers=2, alpha=16):
    """Write an adapter of the query, key and value projections; return what it adds to the weights, by their names."""
    import torch
    from safetensors.torch import save_file

    generator, tensors, added = torch.Generator().manual_seed(7), {}, {}
    parts = ("q_proj", "k_proj", "v_proj")
    for name in (f"model.layers.{layer}.self_attn.{part}" for layer in range(layers) for part in parts):
        rows, columns = weights[f"{name}.weight"].shape
        down = torch.randn(rank, columns, generator=generator) / columns**0.5
        up = torch.randn(rows, rank, generator=generator) * 0.3
        tensors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
        added[f"{name}.weight"] = up @ down * (alpha / rank)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": parts}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return added


def eagle_weights(weights, sizes=None):
    """Return an EAGLE head that drafts nearly as the model: its layers on embeddings, without the sequence's first token."""
    import torch

    sizes = sizes or Sizes()
    head = {name.removeprefix("model."): tensor for name, tensor in weights.items() if name.startswith("model.layers.")}
    # The first layer of a head has no norm before its attention: embeddings have a root mean square near 1 already.
    norm = head.pop("layers.0.input_layernorm.weight")
    for name in ("q", "k", "v"):
        head[f"layers.0.self_attn.{name}_proj.weight"] = head[f"layers.0.self_attn.{name}_proj.weight"] * norm
    return head | {"fc.weight": torch.cat((torch.eye(sizes.hidden), torch.zeros(sizes.hidden, sizes.hidden)), 1)}


def write_tokenizer(folder):
    """Write a tokenizer whose words are w0, w1, ...; a chat is the words of its messages."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{number}": number for number in range(WORDS)} | {"<unk>": WORDS}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
