"""Two-layer models of the families that serving supports, with random weights, in a folder as an engine loads it."""

VOCABULARY = 384
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + 0.01 * i for i in range(48)],
    "long_factor": [1.0 + 0.1 * i for i in range(48)],
    "original_max_position_embeddings": 512,
}
EXPERTS = {"num_experts_per_tok": 2, "head_dim": 64}
# Name: the class in Transformers without "Config" or "ForCausalLM", and what differs from SIZES.
FAMILIES = {
    "llama": ("Llama", {"head_dim": 64}),
    "qwen2": ("Qwen2", {"hidden_size": 256}),
    "qwen3": ("Qwen3", {"head_dim": 128}),
    "mistral": ("Mistral", {"head_dim": 128, "sliding_window": None}),
    "phi3": ("Phi3", {"hidden_size": 384, "original_max_position_embeddings": 2048}),
    "phi4-mini": (
        "Phi3",
        {
            "hidden_size": 512,
            "tie_word_embeddings": True,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 512,
            "rope_parameters": LONG_ROPE,
        },
    ),
    "mixtral": ("Mixtral", EXPERTS | {"num_local_experts": 4}),
    "qwen3-moe": ("Qwen3Moe", EXPERTS | {"num_experts": 4, "moe_intermediate_size": 96}),
}


def write_family(name, folder, dtype=None, **changes):
    """Write a family's model; return the folder. `dtype` is that of the file's weights, float32 if None."""
    family, sizes = FAMILIES[name]
    return write_transformers_model(family, SIZES | sizes | changes, folder, dtype)


def write_gemma3(folder, dtype=None, kinds="sssfsssfsss", head_dim=128, window=64):
    """Write a text-only Gemma 3, whose layers are (s)liding or (f)ull; return the folder."""
    attention = {"s": "sliding_attention", "f": "full_attention"}
    sizes = {
        "num_hidden_layers": len(kinds),
        "layer_types": [attention[kind] for kind in kinds],
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim,
        "sliding_window": window,
        "tie_word_embeddings": True,
    }
    return write_transformers_model("Gemma3", SIZES | sizes, folder, dtype, config="Gemma3TextConfig")


def write_transformers_model(family, sizes, folder, dtype=None, config=None):
    import torch
    import transformers

    torch.manual_seed(0)
    # Queries and keys of one size in all families: attention prefers a few tokens.
    sizes = {"initializer_range": 1.47 / sizes["hidden_size"] ** 0.5} | sizes
    settings = getattr(transformers, config or f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}ForCausalLM")(settings)
    with torch.no_grad():
        for parameter, weight in model.named_parameters():
            # Transformers leaves all biases at 0 and all norms at 1, or at 0 where 1 is added.
            if parameter.endswith("bias"):
                weight.normal_(0, 2.0 if "k_proj" in parameter else 0.3)
            elif "norm" in parameter:
                scale = 0.5 if "q_norm" in parameter or "k_norm" in parameter else 0.0
                weight.copy_(weight + scale + 0.1 * torch.randn_like(weight))
    model.to(dtype or torch.float32).save_pretrained(folder)
    return folder
