"""Decoders that transformers has: what of their config.json is not supported, and what they have no
words for.
"""

import numpy as np
import pytest

from research.core.errors import UserError
from research.interop.architecture import config_from, fields_from
from research.interop.mapping import params_from
from research.models.config import LayerConfig
from tests.interop import registry


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (
            "llama-yarn",
            {"rope_scaling": {"rope_type": "ntk"}},
            "rope_type = 'ntk' is not supported.",
        ),
        (
            "llama-yarn",
            {"rope_scaling": {"rope_type": "linear"}},
            "factor of rope_type = 'linear' is missing",
        ),
        (
            "llama-yarn",
            {"rope_scaling": {"mrope_section": [2]}},
            "mrope_section = [2] of rope_type = 'default'",
        ),
        (
            "llama-yarn",
            {"rope_scaling": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor = 0.5 of rope_type",
        ),
        ("mistral", {"hidden_act": "xielu"}, "hidden_act = 'xielu' is not supported."),
        (
            "mistral",
            {"attention_bias": True},
            "attention_bias = True is a field of 'mistral' that is not supported",
        ),
        ("mistral", {"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ("mistral", {"sliding_window": "8"}, "makes no model"),
        ("gemma2", {"layer_types": ["full_attention"]}, "must be a list of num_hidden_layers = 2"),
        (
            "gemma2",
            {"layer_types": ["chunked_attention"] * 2},
            "'chunked_attention' is not supported",
        ),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("qwen2-moe", {"decoder_sparse_step": 0}, "makes no model"),
        ("qwen3-moe", {"num_experts": 8}, "num_experts = 8 must equal num_local_experts = 4"),
        (
            "phi3",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_type = 'linear' of a Phi-3",
        ),
        ("gpt-oss", {"swiglu_alpha": 1.0}, "swiglu_alpha = 1.0 is not supported: only 1.702 is"),
        (
            "deepseek-v3",
            {"scoring_func": "softmax"},
            "scoring_func = 'softmax' is not supported: only 'sigmoid' is",
        ),
        ("deepseek-v3", {"rope_interleave": False}, "rope_interleave = False is not supported"),
        ("deepseek-v3", {"attention_bias": True}, "attention_bias = True"),
    ],
)
def test_a_value_that_is_not_supported_is_named(name, fields, message):
    architecture = registry.model(name).architecture
    with pytest.raises(UserError) as error:
        config_from(architecture, registry.stored()[name]["config"] | fields)
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
        (
            "deepseek-v3",
            {"head.mtp_depth": 1, "pattern": (LayerConfig(experts=False),)},
            "head.mtp_depth",
        ),
        ("mixtral", {"head.mtp_depth": 1}, "head.mtp_depth"),
        ("olmo2", {"experts": None, "norm.placement": "post"}, "norm.placement"),
    ],
)
def test_a_model_that_the_family_has_no_words_for_is_refused_by_field(name, changes, field):
    architecture, config = registry.model(name).architecture, registry.model(name).config
    with pytest.raises(UserError, match=field):
        fields_from(architecture, registry.changed(config, changes))


def test_dropout_of_attention_is_logged(caplog):
    architecture = registry.model("mistral").architecture
    config_from(architecture, registry.stored()["mistral"]["config"] | {"attention_dropout": 0.25})
    assert "attention_dropout = 0.25 is left out" in caplog.text


def test_all_wrong_tensors_of_experts_are_named_at_once():
    case = registry.model("mixtral")
    architecture, config, tensors = case.architecture, case.config, dict(case.tensors)
    del tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"]
    tensors["model.layers.1.block_sparse_moe.experts.4.w1.weight"] = np.zeros((64, 32), np.float32)
    with pytest.raises(UserError) as error:
        params_from(architecture, config, tensors)
    assert "experts.2.w1.weight is missing" in str(error.value)
    assert "experts.4.w1.weight is not known" in str(error.value)


def test_a_layer_of_a_further_token_that_is_not_counted_is_left_out(caplog):
    case = registry.model("deepseek-v3")
    architecture, config, tensors = case.architecture, case.config, dict(case.tensors)
    caplog.set_level("INFO", logger="tessera")
    params_from(
        architecture,
        config,
        tensors | {"model.layers.61.eh_proj.weight": np.zeros((32, 64), np.float32)},
    )
    assert "model.layers.61.eh_proj.weight left out" in caplog.text
