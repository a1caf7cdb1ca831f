"""What cannot be served on a GPU is refused when the engine starts, in one line that says what to do."""

import pytest

from elastickv.vllm.versions import installed_version, minor_version

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def gpu(device):
    if device == "cpu":
        pytest.skip("runs on a GPU only")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float32"}, "float32.*dtype=bfloat16"),
        ({"kv_cache_dtype": "fp8"}, "fp8"),
        ({"block_size": 16}, "block_size=16"),
        ({"window": 31}, "window.*31.*32"),
        ({"elastickv": {"sinks": 4}}, "no option.*sinks"),
        ({"disable_hybrid_kv_cache_manager": True}, "hybrid"),
    ],
    ids=lambda each: "-".join(map(str, each)) if isinstance(each, dict) else "",
)
def test_what_cannot_be_served_is_refused_at_the_start(serve_bf16, options, words):
    with pytest.raises(Exception, match=words) as refusal:
        serve_bf16(**options)
    print(f"measured: {str(refusal.value).strip().splitlines()[-1]}")


def test_formats_that_contradict_each_other_are_refused_at_the_start(serve_bf16):
    if not minor_version(installed_version().version).named_cache_dtypes:
        pytest.skip("this vLLM names no KV cache dtype of ours")
    with pytest.raises(Exception, match=r"elastickv_int4.*format=int8.*contradict"):
        serve_bf16("int8", kv_cache_dtype="elastickv_int4")
