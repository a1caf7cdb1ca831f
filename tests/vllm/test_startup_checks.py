"""What cannot be served is refused at start-up, in one line with the reason and what to use instead."""

import json
import shlex
import types
from dataclasses import replace

import pytest

from elastickv.errors import UsageError
from elastickv.recipe import HEAD_DIMS
from elastickv.vllm.startup_checks import Device, LayerArguments, check, refusals, windowed_layers_command

H200 = Device("cuda", (9, 0))
CPU = Device("cpu", version="0.32.0")
LAYER = LayerArguments("model.layers.0.self_attn.attn", 32, 8, 128, kv_cache_dtype="elastickv_int4")

DEFAULTS = {
    "model_config": {
        "model": "meta-llama/Llama-3.1-8B",
        "dtype": "torch.bfloat16",
        "use_mla": False,
        "is_encoder_decoder": False,
        "runner_type": "generate",
        "is_hybrid": False,
        "is_mm_prefix_lm": False,
        "attention_chunk_size": None,
    },
    "cache_config": {
        "cache_dtype": "elastickv_int4",
        "block_size": 32,
        "user_specified_block_size": False,
        "sliding_window": None,
        "kv_cache_dtype_skip_layers": [],
    },
    "scheduler_config": {"disable_hybrid_kv_cache_manager": False},
    "parallel_config": {
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "enable_dbo": False,
        "ubatch_size": 0,
    },
    "compilation_config": {},
    "additional_config": {},
    "kv_transfer_config": None,
}
# As vLLM settles them on NVIDIA GPUs.
PASSES = {
    "fuse_rope_kvcache": False,
    "fuse_qk_norm_rope_kvcache": False,
    "fuse_rope_kvcache_cat_mla": True,
    "fuse_attn_quant": True,
}


def config(**changes):
    """Return a fake VllmConfig; a change is named as `cache_config__block_size`."""
    parts = {name: dict(value) if name.endswith("_config") and value else value for name, value in DEFAULTS.items()}
    passes = dict(PASSES)
    for name, value in changes.items():
        part, _, attribute = name.partition("__")
        if part == "passes":
            passes[attribute] = value
        elif attribute:
            parts[part][attribute] = value
        else:
            parts[part] = value
    made = {
        name: types.SimpleNamespace(**value) if isinstance(value, dict) and name != "additional_config" else value
        for name, value in parts.items()
    }
    made["compilation_config"] = types.SimpleNamespace(pass_config=types.SimpleNamespace(**passes))
    return types.SimpleNamespace(**made)


def reason(vllm_config=None, device=H200, layer=LAYER):
    found = refusals(vllm_config or config(), device, layer)
    assert len(found) == 1
    assert "\n" not in found[0]
    with pytest.raises(UsageError) as caught:
        check(vllm_config or config(), device, layer)
    assert str(caught.value) == found[0]
    return found[0]


@pytest.mark.parametrize("device", [H200, Device("cuda", (8, 0)), Device("cuda", (12, 0)), CPU])
@pytest.mark.parametrize("layer", [LAYER, None, *(replace(LAYER, head_dim=head_dim) for head_dim in HEAD_DIMS)])
def test_a_usual_decoder_is_served(device, layer):
    assert refusals(config(), device, layer) == []
    check(config(), device, layer)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_config__use_mla": True}, "multi-head latent attention (MLA)"),
        ({"model_config__is_encoder_decoder": True}, "an encoder and a decoder"),
        ({"model_config__runner_type": "pooling"}, "served for pooling"),
        ({"model_config__is_hybrid": True}, "state-space or linear layers"),
        ({"model_config__attention_chunk_size": 8192}, "within chunks of 8192 tokens"),
    ],
)
def test_a_model_of_another_kind_is_left_to_a_stock_backend(changes, said):
    for device, remedy in ((H200, "leave out ElasticKV's `attention_backend`"), (CPU, "leave out elastickv in")):
        message = reason(config(**changes), device)
        assert said in message and remedy in message


def test_a_model_that_looks_ahead_within_images_serves_text_alone():
    assert "`language_model_only=True`" in reason(config(model_config__is_mm_prefix_lm=True))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention_type": "encoder"}, "is an encoder's"),
        ({"attention_type": "encoder_only"}, "is an encoder's"),
        ({"attention_type": "encoder_decoder"}, "attends to an encoder's output"),
        ({"attention_type": "other"}, "attention of the type other"),
        ({"alibi": True}, "ALiBi slopes"),
        ({"logits_soft_cap": 50.0}, "caps its scores at 50"),
        ({"sinks": True}, "learned attention sinks"),
        ({"shares_cache_of": "model.layers.7.self_attn.attn"}, "reads the cache of model.layers.7.self_attn.attn"),
        ({"value_head_dim": 64}, "keys of 128 and values of 64 channels"),
        ({"head_dim": 72}, "heads of 72 channels, and kernels are built for 64, 80, 96, 112, 128, 192, 256"),
        ({"query_heads": 12}, "12 query heads are not a multiple of 8 KV heads"),
        ({"query_heads": 514, "kv_heads": 1}, "at most 65535 (sequence, KV head) pairs and 256 query heads"),
    ],
)
def test_a_layer_that_no_kernel_serves_is_named_with_the_reason(changes, said):
    message = reason(layer=replace(LAYER, **changes))
    assert message.startswith(f"layer {LAYER.name} ") and said in message and "stock backend" in message


@pytest.mark.parametrize("cap", [None, 0, 0.0])
def test_no_soft_cap_is_none(cap):
    assert refusals(config(), H200, replace(LAYER, logits_soft_cap=cap)) == []


@pytest.mark.parametrize("capability", [(7, 5), (6, 1), (7, 0)])
def test_a_gpu_without_kernels_is_refused_with_the_least_capability(capability):
    message = reason(device=Device("cuda", capability))
    assert f"compute capability {capability[0]}.{capability[1]}" in message and "8.0 or newer" in message


@pytest.mark.parametrize("kind", ["rocm", "xpu", "tpu"])
def test_another_device_is_refused(kind):
    assert f"this is {kind}" in reason(device=Device(kind))


@pytest.mark.parametrize("calibrated", [{}, {"calibration": "c.json"}])
def test_pages_are_selected_on_gpus_by_the_second_model_runner(calibrated):
    selecting = config(additional_config={"elastickv": {"compress": 8} | calibrated})
    said = reason(selecting)
    assert "compress=8" in said and "model runner V2" in said and '"select_pages": false' in said
    assert refusals(selecting, CPU) == []
    selecting.use_v2_model_runner = True
    assert refusals(selecting, H200) == []
    every_page = config(additional_config={"elastickv": {"compress": 3, "calibration": "c.json", "select_pages": False}})
    assert refusals(every_page, H200) == []


def test_a_32_bit_model_is_served_on_cpus_only():
    wide = config(model_config__dtype="torch.float32")
    assert "`dtype=bfloat16` or `dtype=float16`" in reason(wide)
    assert refusals(wide, CPU, LAYER) == []


@pytest.mark.parametrize("device", [H200, CPU])
def test_sums_in_one_order_are_not_promised(device):
    """On CPUs vLLM does not ask the backend."""
    message = reason(device=replace(device, batch_invariant=True))
    assert "VLLM_BATCH_INVARIANT" in message and device.stock_backend in message


@pytest.mark.parametrize("size", [32, 64, 96, 128, 256])
def test_a_block_of_whole_pages_is_mapped_by_vllm(size):
    blocks = {"cache_config__block_size": size, "cache_config__user_specified_block_size": True}
    assert refusals(config(**blocks), H200, LAYER) == []


@pytest.mark.parametrize("size", [1, 8, 16, 48, 100])
def test_another_block_is_refused(size):
    blocks = {"cache_config__block_size": size, "cache_config__user_specified_block_size": True}
    assert reason(config(**blocks)) == (
        f"`block_size={size}` is not whole pages of 32 tokens: give `block_size=32`, a multiple of it, or none"
    )


def test_the_default_of_vllm_is_no_request_for_16_tokens():
    assert refusals(config(cache_config__block_size=16), H200, LAYER) == []


def test_the_hybrid_cache_manager_is_needed():
    off = {"scheduler_config__disable_hybrid_kv_cache_manager": True}
    message = reason(config(**off))
    assert "leave out `disable_hybrid_kv_cache_manager`" in message and "connector" not in message
    message = reason(config(**off, kv_transfer_config=types.SimpleNamespace(kv_connector="SomeConnector")))
    assert "or the KV connector SomeConnector, which cannot have it (vLLM's SupportsHMA)" in message


def joined(*names):
    extra = {"connectors": [{"kv_connector": name, "kv_role": "kv_both"} for name in names]}
    return types.SimpleNamespace(kv_connector="MultiConnector", kv_connector_extra_config=extra)


@pytest.mark.parametrize(
    "transfer",
    [
        None,
        types.SimpleNamespace(kv_connector=None),
        types.SimpleNamespace(kv_connector="OffloadingConnector"),
        joined("OffloadingConnector", "OffloadingConnector"),
        types.SimpleNamespace(kv_connector="Own", kv_connector_module_path="own.connector"),
    ],
)
def test_connectors_that_tell_formats_apart_are_served(transfer):
    assert refusals(config(kv_transfer_config=transfer), H200, LAYER) == []


@pytest.mark.parametrize(
    "transfer",
    [types.SimpleNamespace(kv_connector="NixlConnector"), joined("OffloadingConnector", "NixlConnector")],
)
def test_a_connector_that_could_pass_on_pages_of_another_format_is_refused(transfer):
    message = reason(config(kv_transfer_config=transfer))
    assert "NixlConnector" in message and "use OffloadingConnector, or none" in message


@pytest.mark.parametrize(
    "transfer",
    [types.SimpleNamespace(kv_connector="SimpleCPUOffloadConnector"), joined("SimpleCPUOffloadConnector")],
)
def test_a_connector_that_needs_all_blocks_in_the_prefix_cache_is_refused(transfer):
    message = reason(config(kv_transfer_config=transfer))
    assert "stay in the prefix cache" in message and "use OffloadingConnector" in message


@pytest.mark.parametrize("name", ["decode_context_parallel_size", "prefill_context_parallel_size"])
def test_context_parallel_is_refused_with_tensor_parallel(name):
    message = reason(config(**{f"parallel_config__{name}": 2}))
    assert f"`{name}=2`" in message and "`tensor_parallel_size`" in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parallel_config__enable_dbo": True}, "`enable_dbo=True`"),
        ({"parallel_config__ubatch_size": 2}, "`ubatch_size=2`"),
        ({"parallel_config__enable_dbo": True, "parallel_config__ubatch_size": 2}, "`enable_dbo=True`"),
    ],
)
def test_batches_in_parts_are_refused(changes, said):
    assert said in reason(config(**changes))


@pytest.mark.parametrize("size", [0, 1])
def test_a_whole_batch_is_served(size):
    assert refusals(config(parallel_config__ubatch_size=size), H200, LAYER) == []


@pytest.mark.parametrize("name", ["fuse_rope_kvcache", "fuse_qk_norm_rope_kvcache"])
def test_a_fused_write_past_our_update_is_refused(name):
    message = reason(config(**{f"passes__{name}": True}))
    assert f"`{name}` writes 16-bit keys and values into the cache" in message and f"set {name} to false" in message


@pytest.mark.parametrize("value", [None, False])
def test_a_fused_write_that_is_off_or_unsettled_is_none(value):
    assert refusals(config(passes__fuse_rope_kvcache=value), H200, LAYER) == []


WINDOWED = replace(LAYER, sliding_window=512)


def test_a_windowed_layer_is_refused_with_the_flags_for_a_stock_backend():
    message = reason(layer=WINDOWED)
    command = windowed_layers_command(config(), "0.33.0")
    assert message == (
        f"layer {LAYER.name} attends to a window of 512 tokens, and a stock backend must serve such layers: {command}"
    )
    assert command == (
        "vllm serve meta-llama/Llama-3.1-8B --attention-backend ELASTICKV --kv-cache-dtype elastickv_int4 "
        "--kv-cache-dtype-skip-layers sliding_window "
        '--attention-config \'{"backend_per_kind": {"sliding_window": "FLASH_ATTN"}}\''
    )


def test_the_command_has_the_options_that_were_passed():
    options = {"elastickv": {"format": "int8", "window": 256}}
    named = config(cache_config__cache_dtype="auto", additional_config=options | {"other": 1}, model_config__model="a folder")
    for version in ("0.32.0", "0.33.0"):
        words = shlex.split(windowed_layers_command(named, version))
        assert words[:5] == ["vllm", "serve", "a folder", "--attention-backend", "ELASTICKV"]
        assert "--kv-cache-dtype" not in words and "--kv-cache-dtype-skip-layers" not in words
        assert json.loads(words[words.index("--additional-config") + 1]) == options


def test_the_command_keeps_text_alone():
    assert "--language-model-only" not in windowed_layers_command(config(), "0.33.0")
    text = config(model_config__multimodal_config=types.SimpleNamespace(language_model_only=True))
    assert windowed_layers_command(text, "0.33.0").endswith(" --language-model-only")


def test_a_windowed_layer_on_a_cpu_has_no_other_backend():
    assert "on CPUs one backend serves all layers" in reason(device=CPU, layer=WINDOWED)


@pytest.mark.parametrize("device", [H200, CPU])
def test_a_model_of_windowed_layers_alone_may_be_served_without_windows(device):
    message = reason(config(cache_config__sliding_window=512), device, WINDOWED)
    assert "`disable_sliding_window=True` to serve up to 512 tokens" in message


@pytest.mark.parametrize("longest", [4096, 131072, 262144])
def test_windows_that_cover_all_tokens_need_one_flag(longest):
    """As Phi-3.5 and Phi-4-mini have them."""
    long = config(cache_config__sliding_window=262144, model_config__max_model_len=longest)
    message = reason(long, layer=replace(LAYER, sliding_window=262144))
    assert f"requests have at most {longest}: give `disable_sliding_window=True`" in message and "stock" not in message


def test_layers_that_share_caches_are_refused_before_flags_for_windows_are_named():
    text = types.SimpleNamespace(num_kv_shared_layers=15)
    found = refusals(config(model_config__hf_text_config=text), H200, WINDOWED)
    assert found[0].startswith("15 layers of the model read caches of other layers") and "vllm serve" not in found[0]
    text.num_kv_shared_layers = 0
    assert refusals(config(model_config__hf_text_config=text), H200, LAYER) == []


@pytest.mark.parametrize(("changes", "said"), [({"logits_soft_cap": 50.0}, "caps its scores"), ({"sinks": True}, "sinks")])
def test_flags_for_windows_are_not_the_first_reason_where_full_layers_are_refused_too(changes, said):
    """As in Gemma 2 and GPT-OSS."""
    found = refusals(config(), H200, replace(WINDOWED, **changes))
    assert said in found[0] and "vllm serve" not in found[0]


def test_a_layer_that_is_exempt_from_the_cache_dtype_may_not_stay():
    exempt = config(cache_config__kv_cache_dtype_skip_layers=["0"])
    message = reason(exempt, layer=replace(LAYER, kv_cache_dtype="auto"))
    assert "is exempt from `kv_cache_dtype=elastickv_int4`" in message and "elastickv option layers" in message


def test_every_reason_is_given_and_the_first_is_raised():
    many = config(model_config__use_mla=True, parallel_config__enable_dbo=True)
    found = refusals(many, Device("cuda", (7, 5)), replace(LAYER, alibi=True, sinks=True))
    assert len(found) == 5 and "compute capability" in found[0]
    with pytest.raises(UsageError, match="compute capability"):
        check(many, Device("cuda", (7, 5)), LAYER)


def test_attributes_that_a_version_lacks_are_no_refusals():
    bare = types.SimpleNamespace(
        model_config=types.SimpleNamespace(),
        cache_config=types.SimpleNamespace(cache_dtype="auto", block_size=16),
        scheduler_config=types.SimpleNamespace(),
        parallel_config=types.SimpleNamespace(),
        compilation_config=types.SimpleNamespace(),
    )
    assert refusals(bare, CPU, replace(LAYER, kv_cache_dtype="auto")) == []


def speculation(method, count=3, runner=True, modules=1):
    """Return the configuration of a speculative method; `modules` is how many MTP modules the model has."""
    several = method == "mtp" and min(count, modules) > 1
    made = types.SimpleNamespace(method=method, num_speculative_tokens=count, use_multi_module_mtp=lambda: several)
    return config(speculative_config=made, use_v2_model_runner=runner)


@pytest.mark.parametrize("method", ["ngram", "ngram_gpu", "suffix"])
@pytest.mark.parametrize("runner", [True, False])
def test_drafts_without_layers_are_served_by_any_model_runner(method, runner):
    assert refusals(speculation(method, runner=runner), H200, LAYER) == []


@pytest.mark.parametrize("method", ["draft_model", "eagle", "eagle3", "mtp"])
def test_drafters_with_layers_are_served_by_the_second_model_runner(method):
    assert refusals(speculation(method), H200, LAYER) == []
    for device in (H200, CPU):
        message = reason(speculation(method, runner=False), device)
        assert f"speculation by {method} needs vLLM's model runner V2" in message and "use the method ngram" in message


@pytest.mark.parametrize("method", ["dflash", "dspark", "extract_hidden_states", "custom_class"])
def test_other_drafters_are_refused_with_those_that_are_served(method):
    assert f"speculation by {method} is not served: use the method draft_model, eagle" in reason(speculation(method))


def test_several_mtp_modules_are_refused_and_one_is_served():
    assert refusals(speculation("mtp", 1, modules=3), H200, LAYER) == []
    assert "give num_speculative_tokens=1" in reason(speculation("mtp", 3, modules=3))
