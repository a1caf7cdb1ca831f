"""Tiny random models of many architectures, and batches for them."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

VOCABULARY = 211
PAD = 0
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
WIDE = COMMON | {"hidden_size": 256, "initializer_range": 0.1}
HEAD = {"head_dim": 64}
WINDOW = 48
HYBRID = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**COMMON, **HEAD),
    "llama-mha": lambda: tf.LlamaConfig(**COMMON | {"num_key_value_heads": 4}, **HEAD),
    "llama-mqa": lambda: tf.LlamaConfig(**COMMON | {"num_key_value_heads": 1}, **HEAD),
    "llama-small-heads": lambda: tf.LlamaConfig(**COMMON),
    "mistral": lambda: tf.MistralConfig(**COMMON, **HEAD, sliding_window=None),
    "mistral-windowed": lambda: tf.MistralConfig(**COMMON, **HEAD, sliding_window=WINDOW),
    "qwen2": lambda: tf.Qwen2Config(**WIDE),
    "qwen3": lambda: tf.Qwen3Config(**COMMON, **HEAD),
    "phi3": lambda: tf.Phi3Config(**WIDE, sliding_window=None),
    "gemma2": lambda: tf.Gemma2Config(**COMMON, **HEAD, **HYBRID, query_pre_attn_scalar=64, attn_logit_softcapping=5.0),
    "gemma3": lambda: tf.Gemma3TextConfig(**COMMON, **HEAD, **HYBRID, query_pre_attn_scalar=48),
    "smollm3": lambda: tf.SmolLM3Config(**WIDE, no_rope_layers=[1, 0]),
    "gpt_oss": lambda: tf.GptOssConfig(**COMMON, **HEAD, **HYBRID, num_local_experts=2, num_experts_per_tok=1),
    "granite": lambda: tf.GraniteConfig(**WIDE, attention_multiplier=0.02),
    "olmo2": lambda: tf.Olmo2Config(**WIDE),
}


def model(name: str, seed: int = 0, **changes: Any) -> Any:
    """Return a random model in float32 whose choices depend on what it attends to; `changes` are to its configuration."""
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    config.update(changes)
    made = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if name == "gpt_oss":
        with torch.no_grad():
            for layer in made.model.layers:
                layer.self_attn.sinks.copy_(torch.tensor([1.0, -1.0, 2.0, 0.5]))
    return made


def prompt(batch: int, tokens: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """Return a batch without padding."""
    ids = torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def padded(lengths: list[int], seed: int = 1) -> dict[str, torch.Tensor]:
    """Return a batch of rows of these lengths, padded on the left."""
    inputs = prompt(len(lengths), max(lengths), seed)
    for row, length in enumerate(lengths):
        inputs["attention_mask"][row, : max(lengths) - length] = 0
        inputs["input_ids"][row, : max(lengths) - length] = PAD
    return inputs
