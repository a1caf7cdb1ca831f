"""Blocks that vLLM keeps beyond a process: what may not be read as each other has different names."""

import dataclasses

import torch

from elastickv.recipe import Recipe
from elastickv.vllm import window_cache
from elastickv.vllm.window_cache import WindowShape, window_name

LAYER = "model.layers.3.self_attn.attn"
SHAPE = WindowShape(128, 4736, 8, 128, torch.bfloat16, True)


def name(recipe="int4", smoothing=None, **changes):
    return window_name(LAYER, Recipe.parse(recipe), dataclasses.replace(SHAPE, **changes), smoothing)


def test_the_name_is_the_same_in_every_process():
    assert name() == f"{LAYER}.window-{name()[-12:]}" == name()
    assert set(name()[-12:]) <= set("0123456789abcdef")


def test_whatever_changes_the_bytes_changes_the_name(monkeypatch):
    names = [
        name(),
        name("int8"),
        name("int4,rotate=v"),
        name("int4,rotate=k"),
        name("int4,rotate=k", smoothing=((0, 1), (0, 0))),
        name("int4,rotate=k", smoothing=((0, 0), (0, 1))),
        name("k=int8,v=int4"),
        name("fp8"),
        name("k=int8_per_channel,v=int8"),
        name(tokens=256),
        name(dtype=torch.float16),
        name(slab_bytes=8832),
        name(head_size=64),
        name(kv_heads=4),
    ]
    monkeypatch.setattr(window_cache, "LAYOUT_VERSION", window_cache.LAYOUT_VERSION + 1)
    names.append(name())
    assert len(set(names)) == len(names)


def test_what_changes_no_byte_keeps_the_name():
    assert name(soft=False) == name()


def folder_of(engine):
    """The folder in which vLLM's file tier keeps the blocks of such an engine."""
    from vllm.v1.kv_offload.file_mapper import FileMapper

    groups = [
        {"tokens_per_block": group.kv_cache_spec.block_size, "layer_names": list(group.layer_names)}
        for group in engine.scheduler.kv_cache_config.kv_cache_groups
    ]
    sizes = dict.fromkeys(("tp_size", "pp_size", "pcp_size", "dcp_size"), 1)
    mapper = FileMapper(
        "/kept", "model", tokens_per_hash=32, blocks_per_file=1, rank=0, dtype="float32", kv_cache_groups=groups, **sizes
    )
    return mapper.base_path


def test_engines_with_different_pages_keep_them_in_different_folders(serve):
    options = [{}, {"window": 96}, {"elastickv": {"layers": {"1": "fp8"}}}]
    folders = [folder_of(serve(**each)) for each in options]
    assert len(set(folders)) == len(folders)
