"""Engines on the CPU, and the plain model whose answers they must give. Collected only where vLLM is installed."""

import importlib.metadata
import importlib.util
import os
import sys

import pytest

from tests.helpers.serving_scenarios import ADAPTER_RANK, LENGTHS, NEW_TOKENS, RECIPE, WINDOW, random_prompts

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["*"]


@pytest.fixture(scope="session", autouse=True)
def plug_in(tmp_path_factory):
    """Let vLLM find the plug-in where the package is imported from its source and not installed."""
    group = "vllm.general_plugins"
    if any(point.value.startswith("elastickv.") for point in importlib.metadata.entry_points(group=group)):
        return
    folder = tmp_path_factory.mktemp("installed")
    information = folder / "elastickv_plug_in-0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: elastickv-plug-in\nVersion: 0\n", encoding="utf-8")
    (information / "entry_points.txt").write_text(f"[{group}]\nelastickv = elastickv.vllm.plugin:register\n", encoding="utf-8")
    sys.path.append(str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in (os.environ.get("PYTHONPATH"), str(folder)) if path)


@pytest.fixture(scope="session")
def weights():
    from tests.helpers.served_llama import random_weights

    return random_weights()


@pytest.fixture(scope="session")
def folder(weights, tmp_path_factory):
    from tests.helpers.served_llama import write_model

    return write_model(tmp_path_factory.mktemp("served") / "llama", weights)


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, weights):
    """Return the folder of an adapter, and what it adds to the weights."""
    from tests.helpers.served_llama import write_adapter

    folder = tmp_path_factory.mktemp("adapter")
    return folder, write_adapter(folder, weights, ADAPTER_RANK)


class Engines:
    """One engine at a time; the one before is closed when another is asked for."""

    def __init__(self, folder):
        self.folder, self.key, self.engine = folder, None, None

    def __call__(self, fmt=RECIPE, window=WINDOW, **options):
        """Return the engine with these options, at rest and with an empty prefix cache; `fmt=None` is the stock backend."""
        from tests.helpers.serving_engine import ServingEngine

        plug_in = None if fmt is None else {"format": fmt, "window": window, **options.pop("elastickv", {})}
        key = repr((plug_in, sorted(options.items())))
        if key != self.key:
            self.close()
            self.engine, self.key = ServingEngine(options.pop("folder", self.folder), plug_in, **options), key
        self.engine.forget_prefixes()
        return self.engine

    def close(self):
        engine, self.key, self.engine = self.engine, None, None
        if engine is not None:
            engine.close()


@pytest.fixture(scope="session")
def serve(folder, plug_in):
    engines = Engines(folder)
    yield engines
    engines.close()


@pytest.fixture(scope="session")
def rule(weights):
    """Return the plain model of a recipe and a window."""
    from tests.helpers.read_rule import PlainLlama

    models = {}

    def model(recipe=RECIPE, window=WINDOW, weights=weights, **options):
        key = repr((recipe, window, id(weights), sorted(options.items())))
        if key not in models:
            models[key] = PlainLlama(weights, recipe, window, **options)
        return models[key]

    return model


@pytest.fixture(scope="session")
def prompts():
    return random_prompts(LENGTHS)


@pytest.fixture(scope="session")
def base(serve, prompts):
    """Answers of an engine with room for all requests, each prompt in one step."""
    return serve().generate(prompts, NEW_TOKENS)
