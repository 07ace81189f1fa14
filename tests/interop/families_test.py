"""Every family that transformers has: claims about logits, gradients and the way back, against torch's goldens."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from research.core.errors import UserError
from research.interop.architecture import choose, config_from, fields_from, fields_of
from research.interop.huggingface import ARCHITECTURES
from research.interop.mapping import params_from, tensors_from
from research.models.config import LayerConfig
from tests.interop import cases
from tests.interop.folders import logits_of, measured

# The issue asks for 1e-4 of the largest logit, and of each gradient.
LOGITS, GRADIENTS = 2e-5, 1e-4
NAMES = tuple(cases.stored())


@functools.cache
def golden(name):
    """The architecture, the model, its parameters and the tensors of a golden case."""
    stored = cases.stored()[name]
    architecture, tensors = ARCHITECTURES[stored["config"]["model_type"]], cases.weights(stored["tensors"])
    config = config_from(architecture, fields_of(architecture, stored["config"], tensors))
    return architecture, config, params_from(architecture, config, tensors), tensors


def changed(config, changes):
    """The model with other values, by dotted names."""
    for name, value in changes.items():
        group, _, last = name.rpartition(".")
        if group:
            head, _, rest = group.partition(".")
            inner = changed(getattr(config, head), {f"{rest}.{last}" if rest else last: value})
            config = dataclasses.replace(config, **{head: inner})
        else:
            config = dataclasses.replace(config, **{last: value})
    return config


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients_equal_torch(name):
    architecture, config, params, _ = golden(name)
    logits, gradients = measured(config, params, cases.tokens())
    assert np.abs(cases.golden_logits(name)).max() > 0.5
    off, gradients_off = (
        cases.off_by(logits, name),
        cases.gradients_off_by(tensors_from(architecture, config, gradients), name),
    )
    print(f"{name}: logits {off:.1e}, gradients {gradients_off:.1e}")  # README's table
    assert off < LOGITS
    assert gradients_off < GRADIENTS


@pytest.mark.parametrize("name", NAMES)
def test_tensors_and_config_go_back_as_they_came(name):
    architecture, config, params, tensors = golden(name)
    found = tensors_from(architecture, config, params)
    assert set(found) == set(tensors)
    for each, value in tensors.items():
        np.testing.assert_array_equal(found[each], value, err_msg=each)
    assert config_from(architecture, fields_from(architecture, config)) == config


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama-linear", {"position.scaling.factor": 4.1}),
        ("llama-dynamic", {"position.scaling.factor": 4.1}),
        ("llama-dynamic", {"position.scaling.original_length": 17}),
        ("llama-yarn", {"position.scaling.amplitude": 1.0}),
        ("llama-yarn", {"position.scaling.truncate": False}),
        ("llama-longrope", {"position.scaling.long_factors": (1.0, 2.2, 3.5, 6.0)}),
        ("mistral", {"pattern": (LayerConfig(window=9),)}),
        ("ministral", {"pattern": (LayerConfig(window=8), LayerConfig(), LayerConfig(window=8))}),
        ("gemma2", {"pattern": (LayerConfig(), LayerConfig(window=8))}),
        ("gemma2", {"attention.softcap": 5.1}),
        ("gemma2", {"head.softcap": None}),
        ("gemma2", {"attention.scale": None}),
        ("gemma2", {"norm.unit_offset": False}),
        ("gemma3", {"pattern": (LayerConfig(window=8),) * 2 + (LayerConfig(),)}),  # local layers of the global base
        ("qwen2-windows", {"pattern": (LayerConfig(),)}),
        ("qwen2-moe", {"experts.renormalize": True}),
        ("qwen3", {"position.theta": 10_000.0}),
        ("phi3-longrope", {"position.scaling.amplitude": 1.0}),
        ("gpt-oss", {"mlp.clamp": 1.1}),
        ("gpt-oss", {"mlp.up_offset": 0.0}),
        ("deepseek-v3", {"attention.scale": None}),
        ("deepseek-v3", {"attention.latent.epsilon": 1e-4}),
        ("deepseek-v3", {"experts.groups_per_token": 3}),
    ],
)
def test_another_model_is_seen_by_the_comparison(name, changes):
    _, config, params, _ = golden(name)
    assert cases.off_by(logits_of(changed(config, changes), params, cases.tokens()), name) > 5 * LOGITS


@pytest.mark.parametrize("name", ["gpt-oss", "deepseek-v3"])
def test_another_order_of_columns_is_seen_by_the_comparison(name):
    architecture, config, _, tensors = golden(name)
    kinds = tuple(dataclasses.replace(each, order=None) for each in architecture.tensors)
    params = params_from(dataclasses.replace(architecture, tensors=kinds), config, tensors)
    assert cases.off_by(logits_of(config, params, cases.tokens()), name) > 1e-2


@pytest.mark.parametrize("name", ["gemma3", "deepseek-v3"])
def test_scanned_layers_give_the_same_logits_and_go_back(name):
    architecture, config, _, tensors = golden(name)
    config = dataclasses.replace(config, layer_loop="scan")
    params = params_from(architecture, config, tensors)
    count = config.num_layers - len(config.first_layers)
    assert all(leaf.shape[0] == count for leaf in jax.tree.leaves(params["layers"]))
    assert cases.off_by(logits_of(config, params, cases.tokens()), name) < LOGITS
    found = tensors_from(architecture, config, params)
    for each, value in tensors.items():
        np.testing.assert_array_equal(found[each], value, err_msg=each)


@pytest.mark.parametrize("name", NAMES)
def test_the_architecture_that_is_found_by_itself_holds_the_model(name):
    _, config, params, tensors = golden(name)
    architecture, fields = choose(ARCHITECTURES.values(), config)
    assert config_from(architecture, fields).layers() == config.layers()
    if architecture.model_type == cases.stored()[name]["config"]["model_type"]:
        assert set(tensors_from(architecture, config, params)) == set(tensors)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("llama-yarn", {"rope_scaling": {"rope_type": "ntk"}}, "rope_type = 'ntk' is not supported."),
        ("llama-yarn", {"rope_scaling": {"rope_type": "linear"}}, "factor of rope_type = 'linear' is missing"),
        ("llama-yarn", {"rope_scaling": {"mrope_section": [2]}}, "mrope_section = [2] of rope_type = 'default'"),
        ("llama-yarn", {"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5 of rope_type"),
        ("mistral", {"hidden_act": "xielu"}, "hidden_act = 'xielu' is not supported."),
        ("mistral", {"attention_bias": True}, "attention_bias = True is a field of 'mistral' that is not supported"),
        ("mistral", {"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ("mistral", {"sliding_window": "8"}, "makes no model"),
        ("gemma2", {"layer_types": ["full_attention"]}, "must be a list of num_hidden_layers = 2"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 2}, "'chunked_attention' is not supported"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("qwen2-moe", {"decoder_sparse_step": 0}, "makes no model"),
        ("qwen3-moe", {"num_experts": 8}, "num_experts = 8 must equal num_local_experts = 4"),
        ("phi3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type = 'linear' of a Phi-3"),
        ("gpt-oss", {"swiglu_alpha": 1.0}, "swiglu_alpha = 1.0 is not supported: only 1.702 is"),
        ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func = 'softmax' is not supported: only 'sigmoid' is"),
        ("deepseek-v3", {"rope_interleave": False}, "rope_interleave = False is not supported"),
        ("deepseek-v3", {"attention_bias": True}, "attention_bias = True"),
    ],
)
def test_a_value_that_is_not_supported_is_named(name, fields, message):
    architecture, *_ = golden(name)
    with pytest.raises(UserError) as error:
        config_from(architecture, cases.stored()[name]["config"] | fields)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("mistral", {"first_layers": (LayerConfig(window=4),)}, "layers.1.window"),
        ("gemma2", {"attention.scale": 0.3}, "attention.scale"),
        ("gpt-oss", {"mlp.clamp": None}, "mlp.clamp"),
        ("deepseek-v3", {"experts.shared_dim": 25}, "experts.shared_dim"),
        ("deepseek-v3", {"position.scaling": None}, "attention.scale"),
        ("deepseek-v3", {"head.num_future": 1, "pattern": (LayerConfig(experts=False),)}, "head.num_future"),
        ("mixtral", {"head.num_future": 1}, "head.num_future"),
        ("olmo2", {"experts": None, "norm.placement": "post"}, "norm.placement"),
    ],
)
def test_a_model_that_the_family_has_no_words_for_is_refused_by_field(name, changes, field):
    architecture, config, *_ = golden(name)
    with pytest.raises(UserError, match=field):
        fields_from(architecture, changed(config, changes))


def test_dropout_of_attention_is_logged(caplog):
    architecture, *_ = golden("mistral")
    config_from(architecture, cases.stored()["mistral"]["config"] | {"attention_dropout": 0.25})
    assert "attention_dropout = 0.25 is left out" in caplog.text


def test_all_wrong_tensors_of_experts_are_named_at_once():
    architecture, config, _, tensors = golden("mixtral")
    tensors = dict(tensors)
    del tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"]
    tensors["model.layers.1.block_sparse_moe.experts.4.w1.weight"] = np.zeros((64, 32), np.float32)
    with pytest.raises(UserError) as error:
        params_from(architecture, config, tensors)
    assert "experts.2.w1.weight is missing" in str(error.value)
    assert "experts.4.w1.weight is not known" in str(error.value)


def test_a_layer_of_a_further_token_that_is_not_counted_is_left_out(caplog):
    architecture, config, _, tensors = golden("deepseek-v3")
    caplog.set_level("INFO", logger="tessera")
    params_from(architecture, config, tensors | {"model.layers.61.eh_proj.weight": np.zeros((32, 64), np.float32)})
    assert "model.layers.61.eh_proj.weight left out" in caplog.text
