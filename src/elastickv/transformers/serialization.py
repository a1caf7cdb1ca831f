"""A cache in a safetensors file: arrays and one line of JSON, nothing that is run when it is read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from elastickv.errors import UsageError
from elastickv.inputs import parse_json
from elastickv.recipe import DTYPES, AttentionShape, Recipe
from elastickv.recipe.calibration import ModelCalibration
from elastickv.recipe.recipe import parse_open
from elastickv.recipe.shape import MAX_CONTEXT
from elastickv.recipe.solver import check_context, check_ratio
from elastickv.transformers.budget import Budget, Reading
from elastickv.transformers.config import PREFILLS, ElasticConfig
from elastickv.transformers.cuda_graph.model_patch import install
from elastickv.transformers.device_map import layer_devices
from elastickv.transformers.layer import ElasticLayer
from elastickv.transformers.layer_storage import check_room, new_store
from elastickv.transformers.model_loading import fingerprint
from elastickv.transformers.model_support import Sizes, sizes_of
from elastickv.transformers.padding import Padding
from elastickv.transformers.tensor_parallel import ranks_of

if TYPE_CHECKING:
    from elastickv.transformers.cache import ElasticCache

FORMAT = "elastickv-cache"
VERSION = 2
_KEY = "elastickv"


def save(cache: ElasticCache, path: Path) -> None:
    """Write a cache to `path`."""
    model = cache._guard.model
    if model is None:
        raise UsageError("the model that the cache was made for is gone: a cache is saved with its model's fingerprint")
    _check_one_rank(model)
    tensors: dict[str, torch.Tensor] = {}
    plan = cache._plan
    record: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint(model),
        "model": type(model).__name__,
        "plan": {
            "ratio": plan.ratio,
            "recipe": None if plan.recipe is None else str(plan.recipe),
            "layers": {str(n): str(r) for n, r in plan.layers.items()},
            "context": plan.context,
            "capacity": plan.capacity,
            "prefill": plan.prefill,
            "calibration": None if plan.calibration is None else plan.calibration.dumps(),
        },
        "budget": _budget_record(plan.budget),
        "reading": None if plan.present is None else [plan.present.since, plan.present.until, plan.present.scale],
        "layers": [_layer_record(n, layer, tensors) for n, layer in enumerate(cache.layers)],
    }
    try:
        save_file(tensors or {"empty": torch.zeros(1)}, path, metadata={_KEY: json.dumps(record)})
    except (OSError, SafetensorError) as error:
        raise UsageError(f"the cache cannot be written to {path}: {getattr(error, 'strerror', None) or error}") from None


def load(kind: type[ElasticCache], path: Path, model: Any, capture: bool) -> ElasticCache:
    """Return the cache of a file."""
    _check_one_rank(model)
    # Mapped into memory by its format's own reader, which checks every size against the file: a pipe would be waited for.
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "does not exist"
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
    try:
        made = _loaded(kind, record, tensors, model, capture)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, OverflowError, RuntimeError) as error:
        raise UsageError(f"{path} is damaged: {error or type(error).__name__}") from None
    install(model, capture)
    return made


def _check_one_rank(model: Any) -> None:
    if (count := ranks_of(model).count) > 1:
        raise UsageError(
            f"{type(model).__name__} is split over {count} ranks, and a file holds the KV heads of all: save and load caches "
            "of a model in one process, and keep these in memory"
        )


def _loaded(
    kind: type[ElasticCache], record: dict[str, Any], tensors: dict[str, torch.Tensor], model: Any, capture: bool
) -> ElasticCache:
    said = record["plan"]
    text = said["recipe"]
    recipe = None if text is None else Recipe.parse(text) if record["budget"] is None or said["ratio"] is None else text
    layers = {int(number): Recipe.parse(value) for number, value in said["layers"].items()}
    errors = None if said["calibration"] is None else ModelCalibration.loads(said["calibration"])
    plan = ElasticConfig(
        sizes_of(model), said["ratio"], recipe, layers, errors, said["context"], said["capacity"], said["prefill"]
    )
    _check_plan(plan)
    plan.budget = _budget(record["budget"], plan.sizes)
    plan.present = None if record["reading"] is None else _reading(*record["reading"])
    cache = kind._made(model, plan, capture)
    if plan.budget is None and any(entry.get("store") for entry in record["layers"]):
        raise ValueError("it stores tokens without a budget")
    if len(record["layers"]) != len(cache.layers):
        raise ValueError(f"{len(record['layers'])} layers for a model of {len(cache.layers)}")
    places, one_place = layer_devices(range(len(cache.layers)), cache._guard.device_map), next(model.parameters()).device
    for number, (layer, entry) in enumerate(zip(cache.layers, record["layers"], strict=True)):
        device = torch.device(places[number] or one_place)
        if isinstance(layer, ElasticLayer):
            _fill(
                layer, entry, {n.partition(".")[2]: t for n, t in tensors.items() if n.partition(".")[0] == str(number)}, device
            )
        elif entry["length"]:
            layer.update(tensors[f"{number}.keys"].to(device), tensors[f"{number}.values"].to(device))
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = int(entry["length"])
    return cache


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
        raise ValueError("its budget is of other layers or heads than the model's")
    for recipe in recipes.values():
        recipe.check_shape(shape.head_dim, shape.kv_heads)
    if dtype not in DTYPES:
        raise ValueError(f"its budget is of dtype {dtype}")
    if ratio is not None:
        check_ratio(ratio)
    check_context(context)
    return Budget(recipes, shape, dtype, ratio, context, bool(record["fixed"]))


def _shape(sizes: Sizes, batch: int) -> AttentionShape:
    """Return the shape of a layer as it is stored."""
    return AttentionShape(batch, sizes.query_heads // sizes.kv_heads * sizes.kv_heads, sizes.kv_heads, sizes.stored_head_dim)


def _check_plan(plan: ElasticConfig) -> None:
    """Raise ValueError unless what the file says was asked for could have been."""
    if plan.ratio is not None:
        check_ratio(plan.ratio)
    for tokens in (plan.context, plan.capacity):
        if tokens is not None:
            check_context(tokens)
    if plan.prefill not in PREFILLS or not set(plan.layers) <= set(plan.sizes.elastic):
        raise ValueError("its plan is of another model, or edited")
    if isinstance(plan.recipe, str) and plan.recipe != "auto":
        parse_open(plan.recipe)


def _reading(since: int, until: int, scale: float | None) -> Reading:
    """Return what is read, if it is between two contexts."""
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
    if layer.slots.length:
        tensors[f"{number}.real"] = torch.from_numpy(layer.slots.real(layer.batch).copy())
    if layer.held is not None:
        tensors[f"{number}.held_keys"], tensors[f"{number}.held_values"] = (tensor.contiguous() for tensor in layer.held)
    entry: dict[str, Any] = {"length": layer.slots.length, "batch": layer.batch, "store": None}
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


def _fill(layer: ElasticLayer, entry: dict[str, Any], tensors: dict[str, torch.Tensor], device: torch.device) -> None:
    if not entry["length"]:
        return
    real, batch = tensors["real"].numpy(), int(entry["batch"])
    if real.dtype != np.bool_ or real.shape != (batch, entry["length"]):
        raise ValueError(f"its places are {real.shape}, not {batch} x {entry['length']}")
    slots = Padding()
    ragged = np.flatnonzero(~real.all(axis=0))
    edge = int(ragged[-1]) + 1 if len(ragged) else 0
    slots.add(edge, real[:, :edge])
    slots.add(entry["length"] - edge, None)
    layer.slots, layer.batch, layer.is_initialized = slots, batch, True
    sizes = layer._plan.sizes
    if "held_keys" in tensors:
        kept = (batch, sizes.kv_heads, entry["length"], sizes.head_dim)
        if any(tensors[name].shape != kept or not tensors[name].is_floating_point() for name in ("held_keys", "held_values")):
            raise ValueError(f"its exact tokens are not {kept}")
        layer.held = (tensors["held_keys"].to(device), tensors["held_values"].to(device))
    said = entry["store"]
    if said is None:
        return
    backends = layer._plan.backends
    if backends.at(device).name != said["backend"]:
        raise UsageError(
            f"the cache was saved from the {said['backend']} back end, and the model is on {device}: move the model"
        )
    shape, recipe, capacity, dtype = (
        AttentionShape(*said["shape"]),
        Recipe.parse(said["recipe"]),
        said["capacity"],
        said["dtype"],
    )
    if shape != _shape(sizes, batch) or said["head_dim"] != sizes.head_dim or dtype not in DTYPES:
        raise ValueError(f"its tokens are stored for {shape}, heads of {said['head_dim']} and dtype {dtype}")
    check_context(capacity)
    recipe.check_shape(shape.head_dim, shape.kv_heads)
    recipe.check_anchor_offset(said["phase"])
    # What the file claims is allocated only where it fits.
    check_room(backends.at(device), shape, capacity, dtype, recipe)
    store = new_store(backends, shape, capacity, dtype, recipe, sizes.head_dim, device, said["phase"])
    store.load_state(
        {name: tensor.numpy() for name, tensor in tensors.items() if name not in ("real", "held_keys", "held_values")}
    )
    if (store.lengths != real.sum(axis=1)).any():
        raise ValueError(f"its layer has {store.lengths.tolist()} tokens stored for {real.sum(axis=1).tolist()} places")
    layer.go_on(store)
