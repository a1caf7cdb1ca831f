"""The fingerprint of a model from its files, without building the model: `transformers.model_loading.fingerprint` of it."""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastickv.benchmark.safetensors_header import TensorEntry, read_header
from elastickv.errors import UsageError
from elastickv.kvcache.rounding import to_bf16_bits
from elastickv.transformers.model_loading import FINGERPRINT_SIZES, SAMPLED_COLUMNS, SAMPLED_ROWS

_EMBEDDING = re.compile(r"(?:model|transformer|gpt_neox)\.(?:embed_tokens|wte|word_embeddings|embed_in)\.weight")
# What a plain decoder's files hold; others, such as those of models with a vision encoder, rename tensors when they are loaded.
_DECODER = re.compile(r"(?:model|transformer|gpt_neox|lm_head|embed_out)\..*")
_NUMPY_TYPES: dict[str, Any] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_LAYER = re.compile(r"\.(?:layers|h)\.([0-9]+)\.")


def checkpoint_fingerprint(folder: Path, text_config: Any) -> str | None:
    """Return the fingerprint of the model in a folder, or None where it can't be told from its files.

    It can be told of a decoder in safetensors files whose tensors have the names of the model's parameters.

    Parameters
    ----------
    folder : with model*.safetensors; consolidated files, which hold the same under other names, are not read.
    text_config : the decoder's Transformers configuration.
    """
    try:
        entries = dict(_entries(folder))
    except (OSError, UsageError):
        return None
    embeddings = [name for name in entries if _EMBEDDING.fullmatch(name)]
    if len(embeddings) != 1 or len(entries[embeddings[0]][1].shape) != 2 or not all(map(_DECODER.fullmatch, entries)):
        return None
    digest = hashlib.sha256(repr([getattr(text_config, name, None) for name in FINGERPRINT_SIZES]).encode())
    table = _mapped(*entries[embeddings[0]])
    rows, columns = (max(1, n // most) for n, most in zip(table.shape, (SAMPLED_ROWS, SAMPLED_COLUMNS), strict=True))
    digest.update(_bf16(table[::rows, ::columns], entries[embeddings[0]][1].dtype))
    layers = getattr(text_config, "num_hidden_layers", 0)
    for name in sorted(entries):
        path, entry = entries[name]
        # Layers past the last are a draft's, which Transformers does not load.
        if "norm" in name.lower() and len(entry.shape) == 1 and all(int(layer) < layers for layer in _LAYER.findall(name)):
            digest.update(_bf16(_mapped(path, entry), entry.dtype))
    return digest.hexdigest()[:16]


def checkpoint_folder(model: str, revision: str | None = None, download_dir: str | None = None) -> Path | None:
    """Return the folder of a model's files on this machine, or None; nothing is downloaded.

    Parameters
    ----------
    model : a folder, or a hub id.
    revision : of the hub id.
    download_dir : the hub's cache; None: the usual one.
    """
    if os.path.isdir(model):
        return Path(model)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, revision=revision, cache_dir=download_dir, local_files_only=True))
    except (ImportError, OSError, ValueError):  # what the hub's errors of a missing model and of a malformed id are
        return None


def _entries(folder: Path) -> Iterator[tuple[str, tuple[Path, TensorEntry]]]:
    """Yield the names of embeddings and normalization weights, the files that hold them, and their positions there."""
    wanted = re.compile(rf"{_EMBEDDING.pattern}|.*[nN][oO][rR][mM].*")
    for path in sorted(folder.glob("model*.safetensors")):
        for name, entry in read_header(path, (), wanted)[0].items():
            yield name, (path, entry)


def _mapped(path: Path, entry: TensorEntry) -> NDArray[Any]:
    numbers: NDArray[Any] = np.memmap(path, _NUMPY_TYPES[entry.dtype], "r", entry.start, entry.shape)
    return numbers


def _bf16(values: NDArray[Any], dtype: str) -> bytes:
    """Return numbers as bfloat16, rounded to nearest; those of BF16 are bfloat16 bits already."""
    return (np.ascontiguousarray(values) if dtype == "BF16" else to_bf16_bits(values)).tobytes()
