"""Published shapes of models, for random weights: what `config.json` of each says."""

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_key_value_heads": 8,
    "num_attention_heads": 32,
    "vocab_size": 128256,
}
# The published configurations of Llama 3.1 8B and Llama 3.2 1B; `tiny` is for trying the script.
SHAPES = {
    "8b": _LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128},
    "1b": _LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64, "tie_word_embeddings": True},
    "tiny": _LLAMA
    | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64, "vocab_size": 512}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
}
