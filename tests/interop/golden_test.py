"""Every golden case: logits and gradients equal torch's, another model does not, and all goes back
as it came.
"""

import dataclasses

import jax
import numpy as np
import pytest

from research.interop.architecture import choose, config_from
from research.interop.huggingface import ARCHITECTURES, from_hugging_face, write_hugging_face
from research.interop.mapping import params_from, slice_getter, tensors_from
from research.interop.safetensors_files import read_header
from research.models.config import LayerConfig, PositionConfig
from tests.interop import registry
from tests.interop.folders import write_folder

# What `fast` sees of each claim: windows and scaling, experts, latents, an encoder, two stacks, a
# preset.
FAST = ("gpt2-small", "gemma3", "gpt-oss", "deepseek-v3", "bert", "t5", "gopher", "prefix-gpt2")


def tiers(rows):
    """Parameters, of which those of other cases than `FAST` are `thorough`."""
    for row in rows:
        name, *rest = (row,) if isinstance(row, str) else row
        yield pytest.param(name, *rest, marks=() if name in FAST else pytest.mark.thorough)


STORED = tuple(tiers(registry.stored()))


@pytest.mark.parametrize("name", tiers(registry.CASES))
def test_logits_and_gradients_equal_torch(name):
    suite, (outputs, gradients) = registry.CASES[name], registry.ours(name)
    off, gradients_off = registry.off_by(outputs, name), registry.facts_off_by(gradients, name)
    print(f"{name}: outputs {off:.1e}, gradients {gradients_off:.1e}")  # README's table
    assert all(np.abs(value).max() > 0.1 for value in registry.golden(name).values())
    assert off < suite.logits
    assert gradients_off < registry.GRADIENTS


def window(width):
    def change(config):
        layers = [
            dataclasses.replace(each, window=each.window and width) for each in config.pattern
        ]
        return dataclasses.replace(config, pattern=tuple(layers))

    return change


def backwards(config):
    return dataclasses.replace(config, pattern=config.pattern[::-1])


@pytest.mark.parametrize(
    ("name", "change"),
    tiers(
        [
            ("gpt2-small", {"norm.kind": "rmsnorm"}),
            ("gpt2-small", {"mlp.activation": "gelu"}),
            ("llama-1-7b", {"norm.epsilon": 1e-5}),  # the epsilon of LLaMA 2
            ("llama-1-7b", {"position": PositionConfig(kind="none")}),
            ("llama-3.1-8b", {"position.scaling": None}),
            ("llama-linear", {"position.scaling.factor": 4.1}),
            ("llama-dynamic", {"position.scaling.factor": 4.1}),
            ("llama-dynamic", {"position.scaling.original_length": 17}),
            ("llama-yarn", {"position.scaling.amplitude": 1.0}),
            ("llama-yarn", {"position.scaling.truncate": False}),
            ("llama-longrope", {"position.scaling.long_factors": (1.0, 2.2, 3.5, 6.0)}),
            ("mistral", {"pattern": (LayerConfig(window=9),)}),
            (
                "ministral",
                {"pattern": (LayerConfig(window=8), LayerConfig(), LayerConfig(window=8))},
            ),
            ("gemma2", {"pattern": (LayerConfig(), LayerConfig(window=8))}),
            ("gemma2", {"attention.softcap": 5.1}),
            ("gemma2", {"head.softcap": None}),
            ("gemma2", {"attention.scale": None}),
            ("gemma2", {"norm.unit_offset": False}),
            (
                "gemma3",
                {"pattern": (LayerConfig(window=8),) * 2 + (LayerConfig(),)},
            ),  # local layers of the global base
            ("qwen2-windows", {"pattern": (LayerConfig(),)}),
            ("qwen2-moe", {"experts.renormalize": True}),
            ("qwen3", {"position.theta": 10_000.0}),
            ("phi3-longrope", {"position.scaling.amplitude": 1.0}),
            ("gpt-oss", {"mlp.clamp": 1.1}),
            ("gpt-oss", {"mlp.up_offset": 0.0}),
            ("deepseek-v3", {"attention.scale": None}),
            ("deepseek-v3", {"attention.latent.epsilon": 1e-4}),
            ("deepseek-v3", {"experts.groups_per_token": 3}),
            ("gpt", {"mlp.activation": "gelu"}),
            ("falcon-40b", {"norm.placement": "pre"}),
            ("falcon-rw", {"position": PositionConfig(kind="alibi")}),
            ("mpt", {"position": PositionConfig(kind="none")}),
            ("roberta", {"position.offset": 1, "max_length": 39}),
            ("modernbert", window(4)),
            ("modernbert", window(6)),
            ("t5", {"attention.scale": None}),
            ("t5", {"head.scale": 1.0}),
            ("t5", {"position.max_distance": 140}),
            ("mbart", {"scale_embeddings": False}),
            ("marian", {"position.halves": False}),
            ("gpt-neo", window(7)),
            ("gpt-neo", window(9)),
            ("gpt-neo", backwards),
            ("gpt-neo", {"attention.scale": None}),
            ("transformer", {"position.halves": True}),
            ("transformer", {"scale_embeddings": False}),
            ("gpt-3", window(7)),
            ("gpt-3", window(9)),
            ("gpt-3", backwards),
            ("gpt-3", {"pattern": (LayerConfig(),)}),
            ("gopher", {"position": PositionConfig(kind="none")}),
            ("gopher", {"attention.scale": 1.0}),
            ("prefix", {"position.max_distance": 30}),
            *(
                (name, {"structure": "decoder"})
                for name in ("prefix", "prefix-llama", "prefix-gpt2")
            ),
        ]
    ),
)
def test_another_model_is_seen_by_the_comparison(name, change):
    config = registry.model(name).config
    config = registry.changed(config, change) if isinstance(change, dict) else change(config)
    assert registry.off_by(registry.outputs(name, config), name) > 5 * registry.CASES[name].logits


@pytest.mark.parametrize("name", tiers(["prefix", "prefix-llama", "prefix-gpt2"]))
def test_a_prefix_of_one_token_more_or_less_is_seen_by_the_comparison(name):
    given = registry.batch(name)
    for change in (-1, 1):
        lengths = given["prefix"].sum(axis=1, keepdims=True) + change
        other = given | {"prefix": (given["positions"] < lengths).astype(np.int32)}
        found = registry.outputs(name, registry.model(name).config, other)
        assert registry.off_by(found, name) > 5 * registry.CASES[name].logits


@pytest.mark.parametrize("name", ["gpt-oss", "deepseek-v3"])
def test_another_order_of_columns_is_seen_by_the_comparison(name):
    case = registry.model(name)
    kinds = tuple(dataclasses.replace(each, order=None) for each in case.architecture.tensors)
    params = params_from(
        dataclasses.replace(case.architecture, tensors=kinds), case.config, case.tensors
    )
    assert registry.off_by(registry.outputs(name, case.config, params=params), name) > 1e-2


@pytest.mark.parametrize("name", tiers(["gpt2-small", "llama-3.2-1b", "gemma3", "deepseek-v3"]))
def test_scanned_layers_give_the_same_logits_and_go_back(name):
    case = registry.model(name)
    config = dataclasses.replace(case.config, layer_loop="scan")
    params = params_from(case.architecture, config, case.tensors)
    count = config.num_layers - len(config.first_layers)
    assert all(leaf.shape[0] == count for leaf in jax.tree.leaves(params["layers"]))
    assert (
        registry.off_by(registry.outputs(name, config, params=params), name)
        < registry.CASES[name].logits
    )
    assert registry.same(tensors_from(case.architecture, config, params), case.tensors)


@pytest.mark.parametrize("name", STORED)
def test_round_trip_is_bitwise(name, tmp_path):
    case = registry.model(name)
    config, params = from_hugging_face(
        write_folder(tmp_path / "in", registry.stored()[name]["config"], case.tensors)
    )
    assert config == case.config
    architecture, fields = choose(
        ARCHITECTURES.values(), config, first=case.architecture.model_type
    )
    assert architecture is case.architecture
    assert config_from(architecture, fields) == config
    write_hugging_face(
        architecture, fields, config, slice_getter(config, params), tmp_path / "out", {"pad": None}
    )
    back = {
        key: np.asarray(value)
        for key, value in read_header(tmp_path / "out" / "model.safetensors").items()
    }
    assert registry.same(back, case.tensors)
    again, parameters = from_hugging_face(tmp_path / "out")
    assert again == config
    assert registry.same(registry.leaves(parameters), registry.leaves(params))


@pytest.mark.parametrize("name", STORED)
def test_the_architecture_that_is_found_by_itself_holds_the_model(name):
    case = registry.model(name)
    architecture, fields = choose(ARCHITECTURES.values(), case.config)
    assert config_from(architecture, fields).layers() == case.config.layers()


@pytest.mark.parametrize("name", ["transformer", "gpt-3", "gopher", "prefix"])
def test_a_case_is_its_preset_but_for_its_sizes(name):
    preset = dataclasses.replace(registry.PRESET_CASES[name], shrink="").config()
    shrunk = registry.model(name).config
    for field in ("structure", "norm", "tied_embeddings", "scale_embeddings"):
        assert getattr(shrunk, field) == getattr(preset, field)
    assert shrunk.position.kind == preset.position.kind
    assert (shrunk.mlp.activation, shrunk.mlp.gated) == (preset.mlp.activation, preset.mlp.gated)
    assert [layer.window is None for layer in shrunk.pattern] == [
        layer.window is None for layer in preset.pattern
    ]
