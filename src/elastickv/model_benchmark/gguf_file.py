"""The model of a .gguf file, and the size of its KV cache in each of llama.cpp's types."""

import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from elastickv.errors import UsageError
from elastickv.transformers.gguf.gguf_header import read_gguf_header

# Elements of a block, bytes of a block.
KV_TYPES: dict[str, tuple[int, int]] = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q8_0": (32, 34),
    "q5_1": (32, 24),
    "q5_0": (32, 22),
    "q4_1": (32, 20),
    "q4_0": (32, 18),
    "iq4_nl": (32, 18),
}
MAX_SIZE = 1 << 32  # of any size in the header
_BY_LAYER = ("attention.head_count", "attention.head_count_kv", "attention.sliding_window")  # may be a list
_HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+):([\w./-]+\.gguf)")


@dataclass(frozen=True)
class GgufModel:
    """A model in a .gguf file.

    Attributes
    ----------
    path, file_bytes : of the file.
    architecture : such as 'llama'.
    layers, query_heads : as named.
    kv_heads : of each layer.
    key_dim, value_dim : elements of a head.
    positions : context length that the model was trained for.
    vocabulary : number of tokens.
    uncounted : why the KV bytes cannot be computed from these sizes; None if they can.
    """

    path: Path
    file_bytes: int
    architecture: str
    layers: int
    query_heads: int
    kv_heads: tuple[int, ...]
    key_dim: int
    value_dim: int
    positions: int
    vocabulary: int
    uncounted: str | None

    def kv_bytes_per_token(self, kv_type: str) -> float:
        """Return the bytes that llama.cpp stores per token in all layers."""
        elements, size = KV_TYPES[kv_type]
        return sum(self.kv_heads) * (self.key_dim + self.value_dim) * size / elements

    def check_type(self, kv_type: str) -> None:
        """Check that the blocks of a type fit the heads.

        Raises
        ------
        UsageError : if they do not; names types that do.
        """
        elements = KV_TYPES[kv_type][0]
        if self.key_dim % elements or self.value_dim % elements:
            raise UsageError(
                f"`kv_types`={kv_type} has blocks of {elements} elements and {self.path.name} heads of {self.key_dim}: "
                "give f16, bf16 or f32"
            )


def read_gguf(name: str) -> GgufModel:
    """Read the model's sizes from a file's header.

    Parameters
    ----------
    name : path of a .gguf file; or OWNER/NAME:FILE.gguf, which is downloaded from the hub.

    Raises
    ------
    UsageError : if the file does not exist, is not a .gguf file, or has no language model.
    """
    path = _local_path(name)
    fields = read_gguf_header(path, name)
    architecture = str(fields.get("general.architecture"))

    def size(key: str, default: Any = None) -> Any:
        value = fields.get(f"{architecture}.{key}", default)
        for number in value if isinstance(value, list) and key in _BY_LAYER else [value]:
            if number is not None and not (isinstance(number, int) and 0 <= number <= MAX_SIZE):
                raise UsageError(f"model {name} is damaged ({architecture}.{key} is {str(number)[:40]}): download it again")
        return value

    layers, heads, hidden = (size(key) for key in ("block_count", "attention.head_count", "embedding_length"))
    query_heads = max(heads, default=0) if isinstance(heads, list) else heads
    tokens = fields.get("tokenizer.ggml.tokens")
    if not all((layers, query_heads, hidden, size("context_length"), tokens)) or not isinstance(tokens, list):
        raise UsageError(f"model {name} holds no language model with attention ({architecture}): give one")
    kv_heads = size("attention.head_count_kv", heads)
    kv_heads = tuple(kv_heads) if isinstance(kv_heads, list) else (kv_heads,) * layers
    if len(kv_heads) != layers:
        raise UsageError(f"model {name} is damaged ({len(kv_heads)} KV heads for {layers} layers): download it again")
    head_dim = hidden // query_heads
    return GgufModel(
        path=path,
        file_bytes=path.stat().st_size,
        architecture=architecture,
        layers=layers,
        query_heads=query_heads,
        kv_heads=kv_heads,
        key_dim=size("attention.key_length", head_dim),
        value_dim=size("attention.value_length", head_dim),
        positions=size("context_length"),
        vocabulary=len(tokens),
        uncounted=_uncounted(size),
    )


def _local_path(name: str) -> Path:
    path, hub = Path(os.path.expanduser(name)), _HUB_FILE.fullmatch(name)
    if os.path.isdir(path):
        raise UsageError(f"model {name} is a folder: give the .gguf file in it")
    if os.path.exists(path) or hub is None:
        if name.startswith("shape:"):
            raise UsageError(
                f"model {name} has random weights and no file: give a .gguf file, or OWNER/NAME:FILE.gguf on the hub"
            )
        if not os.path.exists(path):
            raise UsageError(f"model {name} does not exist: give a .gguf file, or OWNER/NAME:FILE.gguf on the hub")
        return path
    if find_spec("huggingface_hub") is None:
        raise UsageError(f"model {name} is on the hub, and huggingface_hub is not installed: pip install huggingface_hub")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(*hub.groups()))
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"model {name} cannot be downloaded: {reason}") from None


def _uncounted(size: Any) -> str | None:
    if size("attention.kv_lora_rank"):
        return "the model keeps latent vectors instead of keys and values"
    if size("attention.sliding_window"):
        return "the model has layers with a sliding window, of which llama.cpp keeps fewer tokens"
    if size("ssm.state_size"):
        return "the model has recurrent layers"
    return None
