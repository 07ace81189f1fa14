"""Presets bind, are as large as published, and are families of their own."""

import dataclasses
import functools
import importlib
import itertools
import pathlib
import re
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import pytest

from research.core import config as configs
from research.core.errors import UserError
from research.core.trees import count
from research.models.config import LayerConfig, ModelConfig
from research.models.initialization import init_params
from tests.configs.published import PAPERS, RELEASED
from tests.configs.released import TRANSFORMERS

FOLDER = pathlib.Path(__file__).parents[2] / "configs" / "model"
FILES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def preset(file: str, size: str) -> ModelConfig:
    return configs.bind(ModelConfig, configs.load_file(f"{FOLDER / file}.py:{size}"), "model")


def size_of(file: str, size: str) -> int:
    config = preset(file, size)
    # Scanned layers are traced once, however many there are; plain attention and zeros take a third
    # of the time.
    attention = dataclasses.replace(config.attention, implementation="reference")
    return parameters(dataclasses.replace(config, layer_loop="scan", attention=attention))


@functools.cache
def parameters(config: ModelConfig) -> int:
    with mock.patch.object(nn.initializers, "normal", return_value=nn.initializers.zeros):
        return count(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))


def sizes(file: str) -> list[str]:
    return list(importlib.import_module(f"configs.model.{file}").SIZES)


@pytest.mark.parametrize("file", FILES)
def test_all_sizes_are_published(file):
    assert (file in RELEASED) != (file in PAPERS)
    assert set(sizes(file)) == set(RELEASED[file] if file in RELEASED else PAPERS[file])


@pytest.mark.fast_cases("gpt2", "llama", "deepseek", "t5", "gpt_oss", "mixtral")
@pytest.mark.parametrize("file", RELEASED)
def test_presets_have_the_released_parameters(file):
    assert {size: size_of(file, size) for size in RELEASED[file]} == RELEASED[file]


@pytest.mark.fast_cases("gpt3", "gopher", "transformer", "prefix")
@pytest.mark.parametrize("file", PAPERS)
def test_presets_have_the_parameters_of_the_paper(file):
    for size, (millions, tolerance) in PAPERS[file].items():
        assert abs(size_of(file, size) / 1e6 - millions) <= tolerance, size


def test_each_count_stands_in_the_preset():
    for file, published in RELEASED.items():
        text = importlib.import_module(f"configs.model.{file}").__doc__
        missing = {size for size, number in published.items() if f"{number:,}" not in text}
        grid = {
            size for size in missing if file == "bert" and "x" in size
        }  # 24 small ones, of which four have names
        assert missing == grid, file


def test_the_files_of_deepseek_v3_hold_685_billion():
    # Beside the further layer lie copies of the embedding and the output projection, and a scale a
    # 128 × 128 block.
    config = preset("deepseek", "v3-671b-mtp")
    numbers = size_of("deepseek", "v3-671b-mtp") + 2 * config.vocab_size * config.embed_dim
    assert round(numbers * (1 + 1 / 128**2) / 1e9) == 685


@pytest.mark.parametrize("file", FILES)
def test_preset_without_a_size_binds(file):
    config = configs.bind(ModelConfig, configs.load_file(f"{FOLDER / file}.py"), "model")
    assert config in [preset(file, size) for size in sizes(file)]


@pytest.mark.parametrize("file", FILES)
def test_unknown_size_names_the_file_and_the_nearest(file):
    size = sizes(file)[0]
    said = f"^config = .*{file}\\.py:{re.escape(size)}\\?': size = .*Did you mean '{size}'"
    with pytest.raises(UserError, match=said):
        preset(file, size + "?")


def shrunk(config: ModelConfig) -> dict[str, Any]:
    """Returns what is left of a model when its sizes are taken away."""
    values = configs.plain(config)
    heads, kv_heads = config.attention.num_heads, config.attention.num_kv_heads
    grouping = "multi-head" if kv_heads == heads else "multi-query" if kv_heads == 1 else "grouped"
    values["attention"] |= {"num_heads": grouping, "num_kv_heads": grouping, "head_dim": 64}
    values["mlp"]["hidden_dim"] = 64
    return values | {
        "vocab_size": 64,
        "num_layers": 4,
        "encoder_layers": 4,
        "embed_dim": 64,
        "max_length": 64,
    }


def test_no_two_families_are_the_same_model():
    families = {file: {str(shrunk(preset(file, size))) for size in sizes(file)} for file in FILES}
    same = {(a, b) for a, b in itertools.combinations(FILES, 2) if families[a] & families[b]}
    # Hoffmann et al. 2022, section 4.1: Chinchilla "uses the same model architecture and training
    # setup as Gopher".
    assert same == {("chinchilla", "gopher")}


@pytest.mark.parametrize(
    ("file", "size", "windows"),
    [
        ("gpt3", "small", [None, 256, None, 256]),
        ("mistral", "7b-v0.1", [4096] * 4),
        ("mistral", "7b-v0.2", [None] * 4),
        ("mistral", "ministral-8b", [None, 32_768, 32_768, 32_768]),
        ("gemma", "2-2b", [4096, None, 4096, None]),
        ("gemma", "3-1b", [512, 512, 512, 512, 512, None, 512]),
        ("gpt_oss", "20b", [128, None, 128, None]),
        ("modernbert", "base", [None, 65, 65, None, 65, 65, None]),
    ],
)
def test_layers_take_turns(file, size, windows):
    layers = preset(file, size).layers()
    assert [layer.window for layer in layers[: len(windows)]] == windows


def test_local_layers_have_rotary_bases_of_their_own():
    for file, size, of_all, local in (
        ("gemma", "3-4b", 1e6, 1e4),
        ("modernbert", "large", 160_000, 1e4),
    ):
        config = preset(file, size)
        bases = {layer.window is None: config.position_of(layer).theta for layer in config.layers()}
        assert bases == {True: of_all, False: local}
        assert all(
            config.position_of(layer).scaling is None for layer in config.layers() if layer.window
        )


def test_first_layers_differ():
    assert preset("deepseek", "v3-671b").layers()[2:4] == (
        LayerConfig(experts=False),
        LayerConfig(),
    )
    assert [layer.attention_norm for layer in preset("modernbert", "base").layers()[:3]] == [
        False,
        True,
        True,
    ]


def on_meta(file: str, size: str) -> Any:
    torch = pytest.importorskip("torch", reason="needs the extra `parity`")
    transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")
    fields = dict(TRANSFORMERS[file, size])
    cls = getattr(transformers, fields.pop("architecture"))
    with torch.device("meta"):
        return cls(cls.config_class(**fields))


@pytest.mark.live
@pytest.mark.parametrize(("file", "size"), TRANSFORMERS)
def test_transformers_counts_the_same_parameters(file, size):
    model = on_meta(file, size)
    number = sum(parameter.numel() for parameter in model.parameters())
    number += sum(
        value.numel()
        for name, value in model.named_buffers()
        if name.endswith("e_score_correction_bias")
    )
    assert number == size_of(file, size)


def test_every_released_family_is_compared_with_transformers():
    assert {file for file, _ in TRANSFORMERS} == set(RELEASED)


@pytest.mark.live
@pytest.mark.parametrize(
    ("file", "size", "attention"),
    [
        ("deepseek", "v3-671b", "model.layers.0.self_attn"),
        ("deepseek", "v2-lite-16b", "model.layers.0.self_attn"),
        ("gemma", "2-27b", "model.layers.0.self_attn"),
        ("gemma", "3-27b", "model.layers.0.self_attn"),
    ],
)
def test_transformers_scales_scores_the_same(file, size, attention):
    assert on_meta(file, size).get_submodule(attention).scaling == pytest.approx(
        preset(file, size).attention.scale
    )


@pytest.mark.live
@pytest.mark.parametrize(
    ("file", "size"), [("gpt_oss", "20b"), ("phi3", "mini-128k"), ("deepseek", "v3-671b")]
)
def test_transformers_has_the_same_rotary_amplitude(file, size):
    rotary = on_meta(file, size).model.rotary_emb
    assert rotary.attention_scaling == pytest.approx(preset(file, size).position.scaling.amplitude)
