"""Save a cache to a safetensors file and read it back. The file holds arrays and one line of JSON, no code."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from elastickv.errors import UsageError
from elastickv.inputs import parse_json
from elastickv.recipe import DTYPES, AttentionShape, Recipe
from elastickv.recipe.calibration import ModelCalibration
from elastickv.recipe.layer_solver import check_stored_bits
from elastickv.recipe.recipe import parse_open
from elastickv.recipe.shape import MAX_CONTEXT
from elastickv.recipe.solver import check_context, check_ratio
from elastickv.transformers.budget import Budget, Reading
from elastickv.transformers.config import PREFILLS, ElasticConfig
from elastickv.transformers.layer import ElasticLayer
from elastickv.transformers.layer_storage import LayerStorage, check_room, new_store
from elastickv.transformers.model_loading import fingerprint
from elastickv.transformers.model_support import Sizes, device_kind, sizes_of
from elastickv.transformers.padding import Padding
from elastickv.transformers.placement import layer_devices, ranks_of

FORMAT = "elastickv-cache"
VERSION = 2
_KEY = "elastickv"


def save(path: Path, model: Any, config: ElasticConfig, layers: Sequence[Any]) -> None:
    """Write a cache to a file.

    Parameters
    ----------
    model : the model that the cache serves; None if it was deleted.
    layers : all layers of the cache, Transformers' own included.

    Raises
    ------
    UsageError : if the model is gone or split over ranks, a layer cannot be saved, or the file cannot be written.
    """
    if model is None:
        raise UsageError("the model that the cache was made for is gone: a cache is saved with its model's fingerprint")
    _check_one_rank(model)
    tensors: dict[str, torch.Tensor] = {}
    record: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint(model),
        "model": type(model).__name__,
        "plan": {
            "ratio": config.ratio,
            "recipe": None if config.recipe is None else str(config.recipe),
            "layers": {str(n): str(r) for n, r in config.layers.items()},
            "context": config.context,
            "capacity": config.capacity,
            "prefill": config.prefill,
            "calibration": None if config.calibration is None else config.calibration.dumps(),
            "by_keys": list(config.by_keys),
            "stored_bits": config.stored_bits,
        },
        "budget": _budget_record(config.budget),
        "reading": None if config.present is None else [config.present.since, config.present.until, config.present.scale],
        "layers": [_layer_record(n, layer, tensors) for n, layer in enumerate(layers)],
    }
    try:
        save_file(tensors or {"empty": torch.zeros(1)}, path, metadata={_KEY: json.dumps(record)})
    except (OSError, SafetensorError, UnicodeError) as error:
        raise UsageError(f"the cache cannot be written to {path}: {getattr(error, 'strerror', None) or error}") from None


class SavedCache:
    """A saved cache that was read from a file.

    Parameters
    ----------
    path : of the file, for error messages.
    record : the file's JSON.
    tensors : the file's arrays by name.
    model : the model that the cache was saved for.

    Attributes
    ----------
    config : what the layers share, as it was when the cache was saved.

    Raises
    ------
    UsageError : if the file is damaged.
    """

    def __init__(self, path: Path, record: dict[str, Any], tensors: dict[str, torch.Tensor], model: Any) -> None:
        self._path, self._record, self._tensors, self._model = path, record, tensors, model
        with _naming(path):
            self.config = _config(record, sizes_of(model))
        self.config.device = device_kind(model)

    def restore(self, layers: Sequence[Any]) -> None:
        """Fill the empty layers of a cache that was made with `config`.

        Raises
        ------
        UsageError : if the file is damaged, or a layer's tokens do not fit into memory or come from another backend.
        """
        with _naming(self._path):
            records = self._record["layers"]
            if len(records) != len(layers):
                raise ValueError(f"{len(records)} layers for a model of {len(layers)}")
            device_map = getattr(self._model, "hf_device_map", None)
            devices, only_device = layer_devices(range(len(layers)), device_map), next(self._model.parameters()).device
            for number, (layer, record) in enumerate(zip(layers, records, strict=True)):
                device, prefix = torch.device(devices[number] or only_device), f"{number}."
                tensors = {name.removeprefix(prefix): t for name, t in self._tensors.items() if name.startswith(prefix)}
                if isinstance(layer, ElasticLayer):
                    _restore_elastic(layer, self.config, record, tensors, device)
                elif record["length"]:
                    layer.update(tensors["keys"].to(device), tensors["values"].to(device))
                    if hasattr(layer, "cumulative_length"):
                        layer.cumulative_length = int(record["length"])


def load(path: Path, model: Any) -> SavedCache:
    """Read a saved cache for the model that it was saved for.

    Raises
    ------
    UsageError : if the file is no saved cache, is damaged, or belongs to another model; if the model is split over ranks.
    """
    _check_one_rank(model)
    # The safetensors reader maps the file into memory and checks every size against it. It would wait on a pipe.
    if not os.path.isfile(path):
        what = "is not a regular file" if os.path.exists(path) else "does not exist"
        raise UsageError(f"{path} is no saved cache: it {what}; give a file that ElasticCache.save wrote")
    try:
        with safe_open(path, "pt") as file:
            record = parse_json((file.metadata() or {}).get(_KEY, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, ValueError) as error:
        raise UsageError(f"{path} is no saved cache: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UsageError(f"{path} is no saved cache: ElasticCache.save writes them")
    if record.get("version") != VERSION:
        raise UsageError(f"{path} is a cache of version {record.get('version')!r}, and this elastickv reads version {VERSION}")
    if record.get("fingerprint") != fingerprint(model):
        raise UsageError(f"{path} is a cache of another model ({record.get('model')}) than this {type(model).__name__}")
    return SavedCache(path, record, tensors, model)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn errors inside the block into UsageErrors that name the file."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, OverflowError, RuntimeError) as error:
        raise UsageError(f"{path} is damaged: {error or type(error).__name__}") from None


def _check_one_rank(model: Any) -> None:
    if (count := ranks_of(model).count) > 1:
        raise UsageError(
            f"{type(model).__name__} is split over {count} ranks, and a file holds the KV heads of all: save and load caches "
            "of a model in one process, and keep these in memory"
        )


def _config(record: dict[str, Any], sizes: Sizes) -> ElasticConfig:
    saved, budget = record["plan"], record["budget"]
    text, ratio = saved["recipe"], saved["ratio"]
    recipe = None if text is None else Recipe.parse(text) if budget is None or ratio is None else text
    layers = {int(number): Recipe.parse(value) for number, value in saved["layers"].items()}
    errors = None if saved["calibration"] is None else ModelCalibration.loads(saved["calibration"])
    config = ElasticConfig(sizes, ratio, recipe, layers, errors, saved["context"], saved["capacity"], saved["prefill"])
    config.stored_bits = saved.get("stored_bits")  # files of earlier versions have none, nor `by_keys`
    _check_config(config)
    config.budget = _budget(budget, sizes)
    config.by_keys = tuple(int(layer) for layer in saved.get("by_keys", ()))
    config.present = None if record["reading"] is None else _reading(*record["reading"])
    if config.budget is None and any(entry.get("store") for entry in record["layers"]):
        raise ValueError("it stores tokens without a budget")
    return config


def _budget_record(budget: Budget | None) -> dict[str, Any] | None:
    if budget is None:
        return None
    shape = budget.shape
    return {
        "recipes": {str(layer): str(recipe) for layer, recipe in budget.recipes.items()},
        "shape": [shape.batch, shape.query_heads, shape.kv_heads, shape.head_dim],
        "dtype": budget.dtype,
        "ratio": budget.ratio,
        "context": budget.context,
        "fixed": budget.fixed,
    }


def _budget(record: dict[str, Any] | None, sizes: Sizes) -> Budget | None:
    if record is None:
        return None
    recipes = {int(layer): Recipe.parse(text) for layer, text in record["recipes"].items()}
    dtype, ratio, context = record["dtype"], record["ratio"], record["context"]
    shape = AttentionShape(*record["shape"])
    if sorted(recipes) != sorted(sizes.elastic) or shape != _shape(sizes, 1):
        raise ValueError("its budget has other layers or heads than the model")
    for recipe in recipes.values():
        recipe.check_shape(shape.head_dim, shape.kv_heads)
    if dtype not in DTYPES:
        raise ValueError(f"its budget is of dtype {dtype}")
    if ratio is not None:
        check_ratio(ratio)
    check_context(context)
    return Budget(recipes, shape, dtype, ratio, context, bool(record["fixed"]))


def _shape(sizes: Sizes, batch: int) -> AttentionShape:
    """Return the shape of a stored layer."""
    return AttentionShape(batch, sizes.query_heads // sizes.kv_heads * sizes.kv_heads, sizes.kv_heads, sizes.stored_head_dim)


def _check_config(config: ElasticConfig) -> None:
    """Raise ValueError unless the file holds valid arguments of `for_model`."""
    if config.ratio is not None:
        check_ratio(config.ratio)
    if config.stored_bits is not None:
        check_stored_bits(config.stored_bits)
        if config.calibration is None:
            raise ValueError("its stored bits have no calibration")
    for tokens in (config.context, config.capacity):
        if tokens is not None:
            check_context(tokens)
    if config.prefill not in PREFILLS or not set(config.layers) <= set(config.sizes.elastic):
        raise ValueError("its plan is of another model, or edited")
    if isinstance(config.recipe, str) and config.recipe != "auto":
        parse_open(config.recipe)


def _reading(since: int, until: int, scale: float | None) -> Reading:
    """Return what is read between two contexts. Raise ValueError if they or the scale are out of range."""
    if not 0 <= since < until <= 2 * MAX_CONTEXT or not (scale is None or 0 < scale < math.inf):
        raise ValueError(f"it reads {scale} from {since} to {until}")
    return Reading(since, until, scale)


def _layer_record(number: int, layer: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    if not isinstance(layer, ElasticLayer):
        if not isinstance(layer, DynamicLayer) or (type(layer) is not DynamicSlidingWindowLayer):
            raise UsageError(
                f"layer {number} is cached as {type(layer).__name__}, which cannot be saved: keep the cache in memory"
            )
        if layer.keys is None:
            return {"length": 0}
        tensors[f"{number}.keys"], tensors[f"{number}.values"] = layer.keys.contiguous(), layer.values.contiguous()
        return {"length": layer.get_seq_length()}
    if layer.padding.length:
        tensors[f"{number}.real"] = torch.from_numpy(layer.padding.real(layer.batch).copy())
    if layer.held is not None:
        tensors[f"{number}.held_keys"], tensors[f"{number}.held_values"] = (tensor.contiguous() for tensor in layer.held)
    entry: dict[str, Any] = {"length": layer.padding.length, "batch": layer.batch, "store": None}
    if layer.store is not None:
        cache, shape = layer.store.cache, layer.store.cache.shape
        entry["store"] = {
            "backend": layer.store.backend_name,
            "shape": [shape.batch, shape.query_heads, shape.kv_heads, shape.head_dim],
            "head_dim": layer.store.head_dim,
            "capacity": cache.capacity,
            "dtype": cache.dtype,
            "recipe": str(cache.recipe),
            "phase": cache.anchor_offset,
        }
        tensors.update({f"{number}.{name}": torch.from_numpy(array) for name, array in layer.store.state().items()})
    return entry


def _restore_elastic(
    layer: ElasticLayer, config: ElasticConfig, record: dict[str, Any], tensors: dict[str, torch.Tensor], device: torch.device
) -> None:
    if not record["length"]:
        return
    real, batch = tensors["real"].numpy(), int(record["batch"])
    if real.dtype != np.bool_ or real.shape != (batch, record["length"]):
        raise ValueError(f"its positions are {real.shape}, not {batch} x {record['length']}")
    held, sizes = None, config.sizes
    if "held_keys" in tensors:
        shape = (batch, sizes.kv_heads, record["length"], sizes.head_dim)
        if any(tensors[name].shape != shape or not tensors[name].is_floating_point() for name in ("held_keys", "held_values")):
            raise ValueError(f"its exact tokens are not {shape}")
        held = (tensors["held_keys"].to(device), tensors["held_values"].to(device))
    store = None if record["store"] is None else _restored_store(config, layer.number, record["store"], batch, tensors, device)
    if store is not None and (store.lengths != real.sum(axis=1)).any():
        raise ValueError(f"its layer has {store.lengths.tolist()} tokens stored for {real.sum(axis=1).tolist()} positions")
    padding = Padding()
    ragged = np.flatnonzero(~real.all(axis=0))
    edge = int(ragged[-1]) + 1 if len(ragged) else 0
    padding.add(edge, real[:, :edge])
    padding.add(record["length"] - edge, None)
    layer.restore(padding, batch, held, store)


def _restored_store(
    config: ElasticConfig,
    number: int,
    record: dict[str, Any],
    batch: int,
    tensors: dict[str, torch.Tensor],
    device: torch.device,
) -> LayerStorage:
    backend, sizes = config.backends.at(device), config.sizes
    if backend.name != record["backend"]:
        raise UsageError(
            f"the cache was saved from the {record['backend']} backend, and the model is on {device}: move the model"
        )
    shape, recipe = AttentionShape(*record["shape"]), Recipe.parse(record["recipe"])
    capacity, dtype = record["capacity"], record["dtype"]
    if shape != _shape(sizes, batch) or record["head_dim"] != sizes.head_dim or dtype not in DTYPES:
        raise ValueError(f"its tokens are stored for {shape}, heads of {record['head_dim']} and dtype {dtype}")
    check_context(capacity)
    recipe.check_shape(shape.head_dim, shape.kv_heads)
    recipe.check_anchor_offset(record["phase"])
    # The file may claim any size: memory is checked before it is allocated.
    check_room(backend, shape, capacity, dtype, recipe)
    statistics = config.statistics_of(number)
    store = new_store(config.backends, shape, capacity, dtype, recipe, sizes.head_dim, device, record["phase"], statistics)
    store.load_state(
        {name: tensor.numpy() for name, tensor in tensors.items() if name not in ("real", "held_keys", "held_values")}
    )
    return store
