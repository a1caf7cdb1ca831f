"""Random weights in the shape of published models, for benchmarks without a download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from elastickv.errors import UsageError
from elastickv.recipe import FORMATS
from elastickv.transformers.model_loading import NEEDED, Loaded, require

PREFIX = "shape:"


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama model.

    Attributes
    ----------
    published : the model that has them.
    hidden, intermediate : channels of the residual stream and of the feed-forward layers.
    layers, query_heads, kv_heads, head_dim, vocabulary, positions : as named.
    tied : whether the output matrix is the embedding.
    rope_factor : 'llama3' scaling of the positions, from 8192; 1 for none.
    """

    published: str
    hidden: int
    intermediate: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int = 128256
    positions: int = 131072
    tied: bool = False
    rope_factor: float = 8.0

    @property
    def parameters(self) -> int:
        """Number of weights."""
        attention = 2 * self.hidden * self.head_dim * (self.query_heads + self.kv_heads)
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.layers * layer + self.hidden

    def weights_bytes(self, dtype: str) -> int:
        """Bytes of the weights."""
        return self.parameters * FORMATS[dtype].bits // 8

    def config(self) -> Any:
        """Return Transformers' configuration."""
        from transformers import LlamaConfig

        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 500000.0}
        if self.rope_factor != 1:
            stretched = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
            rope |= {"rope_type": "llama3", "factor": self.rope_factor} | stretched
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.query_heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.positions,
            tie_word_embeddings=self.tied,
            rms_norm_eps=1e-5,
            rope_parameters=rope,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )


SHAPES = {
    "tiny": Shape("none: for trials", 64, 96, 2, 2, 1, 64, vocabulary=128, positions=8192, rope_factor=1.0),
    "0.5b": Shape("Qwen2.5 0.5B", 896, 4864, 24, 14, 2, 64, vocabulary=151936, positions=32768, tied=True, rope_factor=1.0),
    "1b": Shape("Llama 3.2 1B", 2048, 8192, 16, 32, 8, 64, tied=True, rope_factor=32.0),
    "3b": Shape("Llama 3.2 3B", 3072, 8192, 28, 24, 8, 128, tied=True, rope_factor=32.0),
    "8b": Shape("Llama 3.1 8B", 4096, 14336, 32, 32, 8, 128),
    "70b": Shape("Llama 3.1 70B", 8192, 28672, 80, 64, 8, 128),
    "405b": Shape("Llama 3.1 405B", 16384, 53248, 126, 128, 8, 128),
}


def shape_named(name: str) -> Shape | None:
    """Return the shape of a name such as 'shape:8b'; None for a name without that prefix.

    Raises
    ------
    UsageError : if there is no such shape.
    """
    if not name.startswith(PREFIX):
        return None
    shape = SHAPES.get(name.removeprefix(PREFIX).lower())
    if shape is None:
        raise UsageError(f"{name} is unknown: choose {', '.join(PREFIX + known for known in SHAPES)}")
    return shape


def built(name: str, dtype: str, device: str, seed: int = 0) -> Loaded:
    """Build a model of a published shape with random weights on the device. It has no tokenizer.

    Parameters
    ----------
    name : such as 'shape:8b'.
    dtype : 'fp32', 'fp16' or 'bf16'.

    Raises
    ------
    UsageError : if there is no such shape or dtype.
    """
    require(*NEEDED)
    import torch
    from transformers import AutoModelForCausalLM

    from elastickv.transformers.torch_dtypes import torch_dtype

    shape = shape_named(name)
    if shape is None:
        raise UsageError(f"{name} is no shape: choose {', '.join(PREFIX + known for known in SHAPES)}")
    wanted = torch_dtype(dtype)
    target = torch.device(device)
    with torch.random.fork_rng(devices=[target] if target.type == "cuda" else []), target:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(shape.config(), dtype=wanted)
    return Loaded(name, model.eval(), None)


def usual_device() -> str:
    """Return 'cuda' if PyTorch finds a GPU, else 'cpu'."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def usual_dtype(device: str) -> str:
    """Return the default dtype of models on a device."""
    return "fp32" if device.startswith("cpu") else "bf16"
