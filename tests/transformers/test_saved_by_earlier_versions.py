"""A cache that version 0.1.0 saved, before the packages were renamed, is loaded and continues as one made now.

`data/cache-version-2.safetensors` was saved after 75 random prompt tokens (torch seed 0) and one generated one.
"""

from pathlib import Path

import pytest
import torch

import elastickv.transformers as ekv
from tests.helpers.model_matrix import model

SAVED = Path(__file__).with_name("data") / "cache-version-2.safetensors"
RECIPE = "int4,pages=1/2,anchor_every=2,sinks=4,window=8"


@pytest.fixture(scope="module")
def tiny():
    return model("llama")


def test_a_cache_of_an_earlier_version_is_loaded_and_continues_as_a_new_one(tiny):
    prompt = torch.randint(3, 60, (1, 75), generator=torch.Generator().manual_seed(0))
    made = ekv.ElasticCache.for_model(tiny, recipe=RECIPE)
    options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    text = tiny.generate(prompt, past_key_values=made, max_new_tokens=2, **options)
    saved = ekv.ElasticCache.load(SAVED, tiny)
    assert saved.lengths == made.lengths == (76,)
    assert [str(recipe) for recipe in saved.recipes] == [str(recipe) for recipe in made.recipes]
    options["attention_mask"] = torch.ones_like(text)
    texts = [tiny.generate(text, past_key_values=cache, max_new_tokens=8, **options).tolist() for cache in (saved, made)]
    assert texts[0] == texts[1]
