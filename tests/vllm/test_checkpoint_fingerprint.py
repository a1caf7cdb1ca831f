"""The fingerprint of a model's files is that of the model that Transformers builds of them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from elastickv.transformers.model_loading import fingerprint
from elastickv.vllm.checkpoint_fingerprint import checkpoint_fingerprint, checkpoint_folder
from tests.helpers.model_matrix import model
from tests.helpers.tiny_models import tiny_llama

DECODERS = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "smollm3", "gpt_oss", "granite", "olmo2"]


@pytest.fixture
def saved(tmp_path):
    made = tiny_llama().model
    made.save_pretrained(tmp_path)
    return made, tmp_path


def text_config(made):
    return made.config.get_text_config(decoder=True)


@pytest.mark.parametrize("name", DECODERS)
def test_every_usual_decoder_is_told_from_its_files(tmp_path, name):
    made = model(name)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() == 1:
                weight.copy_(torch.randn_like(weight))  # otherwise all norms are alike, and their order shows nothing
    made.save_pretrained(tmp_path)
    assert checkpoint_fingerprint(tmp_path, text_config(made)) == fingerprint(made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_files_of_a_model_have_the_fingerprint_of_the_model(saved, dtype):
    made, folder = saved
    made.to(dtype).save_pretrained(folder)
    assert checkpoint_fingerprint(folder, text_config(made)) == fingerprint(made)


def test_a_model_in_several_files_has_the_same_fingerprint(saved):
    made, folder = saved
    (folder / "model.safetensors").unlink()
    made.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert checkpoint_fingerprint(folder, text_config(made)) == fingerprint(made)


def test_another_weight_is_another_fingerprint(saved):
    made, folder = saved
    other = tiny_llama(seed=1).model
    other.save_pretrained(folder)
    assert checkpoint_fingerprint(folder, text_config(made)) == fingerprint(other) != fingerprint(made)


def test_a_changed_norm_is_another_fingerprint(saved):
    made, folder = saved
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, folder / "model.safetensors")
    assert checkpoint_fingerprint(folder, text_config(made)) not in (None, fingerprint(made))


def test_a_drafts_layer_in_the_files_does_not_count(saved):
    made, folder = saved
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.input_layernorm.weight"] = torch.ones(4)
    save_file(tensors, folder / "model.safetensors")
    assert checkpoint_fingerprint(folder, text_config(made)) == fingerprint(made)


def test_weights_under_other_names_beside_the_model_do_not_count(saved):
    made, folder = saved
    save_file({"tok_embeddings.weight": torch.ones(4, 4), "norm.weight": torch.ones(4)}, folder / "consolidated.safetensors")
    assert checkpoint_fingerprint(folder, text_config(made)) == fingerprint(made)


@pytest.mark.parametrize("rename", [("model.", "language_model.model."), ("model.", "model.language_model.")])
def test_files_whose_tensors_are_renamed_when_loaded_have_none(saved, rename):
    made, folder = saved
    tensors = {name.replace(*rename, 1): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    assert checkpoint_fingerprint(folder, text_config(made)) is None


def test_files_with_the_norms_of_an_image_encoder_have_none(saved):
    made, folder = saved
    save_file({"vision_tower.norm.weight": torch.ones(4)}, folder / "model-vision.safetensors")
    assert checkpoint_fingerprint(folder, text_config(made)) is None


def test_a_folder_without_weights_or_with_broken_ones_has_none(saved, tmp_path):
    made, folder = saved
    assert checkpoint_fingerprint(tmp_path / "missing", text_config(made)) is None
    (folder / "model.safetensors").write_bytes(b"\x80" + json.dumps({}).encode())
    assert checkpoint_fingerprint(folder, text_config(made)) is None
    (folder / "model.safetensors").unlink()
    assert checkpoint_fingerprint(folder, text_config(made)) is None


def test_the_folder_of_a_model_is_its_own_or_that_in_the_hubs_cache(saved, tmp_path):
    _, folder = saved
    assert checkpoint_folder(str(folder)) == folder
    cached = tmp_path / "hub" / "models--owner--name"
    (cached / "snapshots" / "0123").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123", encoding="utf-8")
    assert checkpoint_folder("owner/name", download_dir=str(tmp_path / "hub")) == cached / "snapshots" / "0123"


@pytest.mark.parametrize("model", ["owner/name", "no/such/folder", "", "a b", "x" * 300])
def test_a_model_that_is_not_on_this_machine_has_no_folder(tmp_path, model):
    assert checkpoint_folder(model, download_dir=str(tmp_path)) is None
