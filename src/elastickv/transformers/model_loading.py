"""Load a model by name: a local directory, a GGUF file or a hub id."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from elastickv.errors import UsageError
from elastickv.transformers.gguf_header import read_gguf_header

NEEDED = ("torch", "transformers")
INSTALL = 'pip install "elastickv[transformers]"'
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_SAMPLED_ROWS = 16
_SAMPLED_COLUMNS = 64


@dataclass(frozen=True)
class Loaded:
    """A model and its tokenizer.

    Attributes
    ----------
    name : the last part of the name that the user gave.
    model : a Transformers causal language model in evaluation mode.
    tokenizer : its tokenizer.
    """

    name: str
    model: Any
    tokenizer: Any


def require(*packages: str) -> None:
    """Check that optional packages are installed.

    Raises
    ------
    UsageError : naming the missing packages and the command that installs them.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UsageError(f"{' and '.join(missing)} not installed: {INSTALL}")


def load_model(name: str, dtype: str = "fp32", device: str = "cpu") -> Loaded:
    """Load a causal language model.

    A directory or a .gguf file is read from disk only. Any other name is a hub id, and may be downloaded. Weights are never
    unpickled, and no code of the model's repository is run.

    Parameters
    ----------
    name : path of a directory, path of a .gguf file, or hub id.
    dtype : 'fp32', 'fp16' or 'bf16'.
    device : PyTorch's name of a device.

    Raises
    ------
    UsageError : if a package is missing, the model does not exist or is no decoder-only model.
    """
    require(*NEEDED)
    import torch
    import transformers

    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if dtype not in dtypes:
        raise UsageError(f"dtype {dtype!r} is unknown: choose {', '.join(dtypes)}")
    folder, options = _source(name)
    try:
        with _quiet(transformers, bars="gguf_file" in options):
            if "gguf_file" not in options:
                check_config(transformers.AutoConfig.from_pretrained(folder, **options), name)
                weights = options | {"use_safetensors": True}
            else:
                weights = options
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtypes[dtype], **weights)
            check_config(model.config, name)
            # For a .gguf file, Transformers sets this to the folder.
            model.config.name_or_path = name
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    except (UsageError, MemoryError):
        raise
    except (
        Exception
    ) as error:  # whatever the parsers of files and weights raise: SafetensorError, struct.error, IndexError, ...
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"model {name} cannot be loaded: {reason}") from None
    return Loaded(Path(name).name, model.to(device).eval(), tokenizer)


def check_config(config: Any, name: str) -> None:
    """Check that a model has the KV cache of a decoder-only model.

    Raises
    ------
    UsageError : for encoder-decoders and for models without attention heads.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(f"model {name} is an encoder-decoder: a decoder-only language model is needed")
    text = config.get_text_config(decoder=True)
    if not getattr(text, "num_attention_heads", None) or not hasattr(text, "use_cache"):
        raise UsageError(f"model {name} ({config.model_type}) has no KV cache: a model with attention in every layer is needed")


def _source(name: str) -> tuple[str, dict[str, Any]]:
    path = Path(os.path.expanduser(name))  # "~name" of an unknown user stays as it is
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"model {name} is a folder without a config.json: give a model's folder or a .gguf file")
        return str(path), {"local_files_only": True}
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise UsageError(f"model {name} does not exist: give a .gguf file, a model's folder or a hub id")
        require("gguf", "accelerate")
        read_gguf_header(path, name)  # Transformers would read a damaged file for minutes
        return str(path.parent), {"gguf_file": path.name, "local_files_only": True}
    if path.exists():
        raise UsageError(f"model {name} is neither a folder nor a .gguf file: give one of these, or a hub id")
    if not _HUB_ID.fullmatch(name):
        raise UsageError(f"model {name} does not exist: give a model's folder, a .gguf file or a hub id (OWNER/NAME)")
    return name, {}


@contextmanager
def _quiet(transformers: Any, bars: bool) -> Iterator[None]:
    """Keep progress bars and log messages of the loader off the terminal; errors are raised as usual.

    Parameters
    ----------
    bars : whether the loader shows progress bars that Transformers' own switch does not reach, as for .gguf files.
    """
    logging = transformers.utils.logging
    level, enabled = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(StringIO()) if bars else nullcontext():
            yield
    finally:
        logging.set_verbosity(level)
        if enabled:
            logging.enable_progress_bar()


def fingerprint(model: Any) -> str:
    """Return 16 hex digits that identify a model, independent of the dtype and the devices it is loaded to.

    SHA-256 of the configuration's sizes, normalization weights, and a grid of embedding values as bfloat16: weights that every
    rank has in full when the others are split over devices.
    """
    import torch

    text = model.config.get_text_config(decoder=True)
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    digest = hashlib.sha256(repr([getattr(text, name, None) for name in names]).encode())
    embedding = model.get_input_embeddings().weight.detach()
    whole = embedding.full_tensor() if hasattr(embedding, "full_tensor") else embedding
    rows, columns = (max(1, size // most) for size, most in zip(whole.shape, (_SAMPLED_ROWS, _SAMPLED_COLUMNS), strict=True))
    weights = [whole[::rows, ::columns]]
    weights += [w.detach() for name, w in sorted(model.named_parameters()) if w.dim() == 1 and "norm" in name.lower()]
    for weight in weights:
        digest.update(weight.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
