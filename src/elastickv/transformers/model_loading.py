"""Load a model by name: a local directory, a .gguf file or a hub id. Random weights: `model_benchmark.model_source`."""

import copy
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from elastickv.errors import UsageError
from elastickv.transformers.gguf.gguf_header import read_gguf_header
from elastickv.transformers.gguf.gguf_readers import GgufReaders

NEEDED = ("torch", "transformers")
INSTALL = 'pip install "elastickv[transformers]"'
SHAPE_PREFIX = "shape:"
MODEL_FORMS = "a model's folder, a .gguf file, a hub id (OWNER/NAME) or shape:NAME (random weights, for speed alone)"
_HUB_ID = re.compile(r"(?=.{1,96}$)[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)  # the hub's own rule
_MOST_DIGITS = 4
# What a fingerprint is of; `vllm.checkpoint_fingerprint` computes the same from a model's files.
FINGERPRINT_SIZES = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
SAMPLED_ROWS = 16
SAMPLED_COLUMNS = 64


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

    def save(self, folder: Path) -> None:
        """Write the model as a folder of Transformers in its dtype, which other programs read: a .gguf file is none to them."""
        config = copy.deepcopy(self.model.config)
        if hasattr(config, "quantization_config"):  # of the file: these weights are numbers
            del config.quantization_config
        plain = type(self.model)(config).to(self.model.dtype)
        plain.load_state_dict(self.model.state_dict())
        plain.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def require(*packages: str) -> None:
    """Check that optional packages are installed.

    Raises
    ------
    UsageError : naming the missing packages and the command that installs them.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UsageError(f"{' and '.join(missing)} not installed: {INSTALL}")


def check_device(device: str) -> None:
    """Check that PyTorch has a device.

    Raises
    ------
    UsageError : if it has not, or the name is neither of a CPU nor of a CUDA device.
    """
    import torch

    kind, colon, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (colon and not (number.isascii() and number.isdigit() and len(number) < _MOST_DIGITS)):
        raise UsageError(f"`device`={device} is unknown: choose cpu or cuda")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if not count:
        raise UsageError(f"`device`={device}: PyTorch finds no CUDA device; leave the option out to run on the CPU")
    if int(number or 0) >= count:
        raise UsageError(f"`device`={device} does not exist: {kind}:0 to {kind}:{count - 1} do")


class Checkpoint:
    """A model on disk or on the hub, whose configuration, tokenizer and weights are read when they are needed.

    A directory or a .gguf file is read from disk only. Any other name is a hub id, and may be downloaded. Weights are never
    unpickled, and no code of the model's repository is run.

    Parameters
    ----------
    name : path of a directory, path of a .gguf file, or hub id.

    Raises
    ------
    UsageError : from every method too, if a package is missing, the model does not exist or is no decoder-only model.
    """

    def __init__(self, name: str) -> None:
        require(*NEEDED)
        self.name = name
        self._folder, self._options = _source(name)
        self._gguf = GgufReaders() if "gguf_file" in self._options else None

    @cached_property
    def config(self) -> Any:
        """Transformers' configuration."""
        with self._reading() as transformers:
            config = transformers.AutoConfig.from_pretrained(self._folder, **self._options)
            check_config(config, self.name)
            return config

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        with self._reading() as transformers:
            return transformers.AutoTokenizer.from_pretrained(self._folder, **self._options)

    @cached_property
    def generation_config(self) -> Any:
        """Transformers' settings of generation; where there is no file of them, those in the configuration."""
        with self._reading() as transformers:
            try:
                return transformers.GenerationConfig.from_pretrained(self._folder, **self._options)
            except OSError:
                return transformers.GenerationConfig.from_model_config(self.config)

    def load(self, dtype: str = "fp32", device: str = "cpu") -> Loaded:
        """Load the weights; see `load_model`."""
        from elastickv.transformers.torch_dtypes import torch_dtype

        wanted = torch_dtype(dtype)
        check_device(device)
        options = self._options | ({"use_safetensors": True} if self._gguf is None else {})
        config = self.config
        with self._reading() as transformers:
            model = transformers.AutoModelForCausalLM.from_pretrained(self._folder, config=config, dtype=wanted, **options)
            check_config(model.config, self.name)
            # For a .gguf file, Transformers sets this to the folder.
            model.config.name_or_path = self.name
        return Loaded(Path(self.name).name, model.to(device).eval(), self.tokenizer)

    @contextmanager
    def _reading(self) -> Iterator[Any]:
        """Give Transformers, quiet, and whose errors name the model."""
        import transformers

        try:
            with _quiet(transformers, bars=self._gguf is not None), self._gguf or nullcontext():
                yield transformers
        except (UsageError, MemoryError):
            raise
        except (
            Exception
        ) as error:  # whatever the parsers of files and weights raise: SafetensorError, struct.error, IndexError, ...
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UsageError(f"model {self.name} cannot be loaded: {reason}") from None


def load_model(name: str, dtype: str = "fp32", device: str = "cpu") -> Loaded:
    """Load a causal language model with its tokenizer.

    Parameters
    ----------
    name : path of a directory, path of a .gguf file, or hub id.
    dtype : 'fp32', 'fp16' or 'bf16'.
    device : PyTorch's name of a device.

    Raises
    ------
    UsageError : if a package is missing, the model does not exist or is no decoder-only model.
    """
    return Checkpoint(name).load(dtype, device)


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
    if name.startswith(SHAPE_PREFIX):
        raise UsageError(
            f"model {name} has random weights, whose predictions mean nothing: give a model's folder, a .gguf file or a hub id"
        )
    path = Path(os.path.expanduser(name))  # "~name" of an unknown user stays as it is
    if os.path.isdir(path):
        if not os.path.isfile(path / "config.json"):
            raise UsageError(f"model {name} is a folder without a config.json: give {MODEL_FORMS}")
        return str(path), {"local_files_only": True}
    if path.suffix.lower() == ".gguf":
        if not os.path.isfile(path):
            raise UsageError(f"model {name} does not exist: give {MODEL_FORMS}")
        require("gguf", "accelerate")
        read_gguf_header(path, name)  # Transformers would read a damaged file for minutes
        return str(path.parent), {"gguf_file": path.name, "local_files_only": True}
    if os.path.exists(path):
        raise UsageError(f"model {name} is neither a folder nor a .gguf file: give {MODEL_FORMS}")
    if not _HUB_ID.fullmatch(name):
        raise UsageError(f"model {name} does not exist: give {MODEL_FORMS}")
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
    digest = hashlib.sha256(repr([getattr(text, name, None) for name in FINGERPRINT_SIZES]).encode())
    embedding = model.get_input_embeddings().weight.detach()
    whole = embedding.full_tensor() if hasattr(embedding, "full_tensor") else embedding
    rows, columns = (max(1, size // most) for size, most in zip(whole.shape, (SAMPLED_ROWS, SAMPLED_COLUMNS), strict=True))
    weights = [whole[::rows, ::columns]]
    weights += [w.detach() for name, w in sorted(model.named_parameters()) if w.dim() == 1 and "norm" in name.lower()]
    for weight in weights:
        digest.update(weight.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
