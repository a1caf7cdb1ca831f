"""Which attention backend a CPU gets: that of the stock engine, unless the configuration asks for ElasticKV."""

from types import SimpleNamespace

import pytest
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from elastickv.errors import UsageError
from elastickv.vllm import cpu_backend
from elastickv.vllm.attention_backend import CpuElasticAttentionBackend


def selected(monkeypatch, config, name="CPU_ATTN"):
    """Return the class that vLLM loads in place of one of its own, as it loads it."""
    monkeypatch.setattr("vllm.config.get_current_vllm_config_or_none", lambda: config)
    return resolve_obj_by_qualname(cpu_backend.path_of(name))


@pytest.mark.parametrize(
    "config",
    [
        None,
        SimpleNamespace(additional_config=None),
        SimpleNamespace(additional_config={}),
        SimpleNamespace(additional_config={"another": {"format": "int4"}}),
        SimpleNamespace(additional_config=SimpleNamespace(elastickv={"format": "int4"})),
    ],
    ids=["no configuration", "nothing", "empty", "another plug-in's", "not a mapping"],
)
def test_without_our_options_the_stock_backend_serves_a_cpu(monkeypatch, config):
    assert selected(monkeypatch, config) is CPUAttentionBackend


@pytest.mark.parametrize("options", [{"format": "int4"}, {}])
def test_our_options_select_our_backend_under_the_stock_name(monkeypatch, options):
    found = selected(monkeypatch, SimpleNamespace(additional_config={"elastickv": options}))
    assert found is CpuElasticAttentionBackend
    assert found.get_name() == CPUAttentionBackend.get_name()


@pytest.mark.parametrize("name", ["CPU_MLA", "AMX_MLA"])
def test_backends_of_latent_attention_are_stock_without_our_options_and_refused_with_them(monkeypatch, name):
    stock = selected(monkeypatch, SimpleNamespace(additional_config={}), name)
    assert stock.get_name() == name and stock.is_mla()
    monkeypatch.setattr("elastickv.vllm.startup_checks.refusals", lambda config, device: [f"MLA on {device.kind}"])
    with pytest.raises(UsageError, match=r"^MLA on cpu$"):
        selected(monkeypatch, SimpleNamespace(additional_config={"elastickv": {}}), name)


def test_the_choice_is_made_anew_each_time(monkeypatch):
    ours = SimpleNamespace(additional_config={"elastickv": {"format": "int4"}})
    stock = SimpleNamespace(additional_config={})
    found = [selected(monkeypatch, config) for config in (ours, stock, ours)]
    assert found == [CpuElasticAttentionBackend, CPUAttentionBackend, CpuElasticAttentionBackend]


def test_other_names_are_not_there():
    with pytest.raises(AttributeError, match=r"elastickv\.vllm\.cpu_backend has no attribute Other"):
        resolve_obj_by_qualname(cpu_backend.path_of("Other"))
