"""A model that cannot be is refused with the field, its value and the constraint."""

from typing import Any

import pytest

from research.core.config import bind, plain
from research.core.errors import UserError
from research.models.config import ModelConfig
from tests.tiny import tiny_config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("vocab_size", 0, "model.vocab_size = 0 must be at least 1."),
        (
            "vocab_size",
            2**31,
            "model.vocab_size = 2147483648 must be below 2,147,483,648, an array's limit.",
        ),
        ("num_layers", -1, "model.num_layers = -1 must be at least 1."),
        ("dropout", 1.0, "model.dropout = 1.0 must lie in [0, 1)."),
        (
            "attention.num_kv_heads",
            3,
            "model.attention.num_kv_heads = 3 does not divide num_heads = 4.",
        ),
        ("attention.num_heads", 0, "model.attention.num_heads = 0 must be at least 1."),
        (
            "attention.head_dim",
            3,
            "model.attention.head_dim = 3 must be even for rotary positions.",
        ),
        ("mlp.activation", "swish", "model.mlp.activation = 'swish' is not one of"),
        ("mlp.hidden_dim", 0, "model.mlp.hidden_dim = 0 must be at least 1."),
        (
            "position.scaling",
            {"factor": 8.0},
            "model.position.scaling.original_length = 0 must be at least 1",
        ),
        ("position.theta", 1.0, "model.position.theta = 1.0 must be above 1."),
        ("norm.epsilon", -1.0, "model.norm.epsilon = -1.0 must not be below 0."),
        ("init_stddev", -0.1, "model.init_stddev = -0.1 must not be below 0."),
    ],
)
def test_impossible_value_is_refused(path: str, value: Any, message: str):
    values = plain(tiny_config())
    *groups, field = path.split(".")
    parent = values
    for group in groups:
        parent = parent[group]
    parent[field] = value
    with pytest.raises(UserError) as caught:
        bind(ModelConfig, values, "model")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("low", [0.0, 4.0, 5.0])
def test_rope_scaling_factors_out_of_order_are_refused(low: float):
    scaling = {
        "factor": 8.0,
        "low_frequency_factor": low,
        "high_frequency_factor": 4.0,
        "original_length": 64,
    }
    with pytest.raises(UserError, match=r"scaling.low_frequency_factor = .* must be between 0 and"):
        bind(ModelConfig, plain(tiny_config()) | {"position": {"scaling": scaling}}, "model")


def test_scaling_of_positions_that_do_not_turn_is_refused():
    scaling = {
        "factor": 8.0,
        "low_frequency_factor": 1.0,
        "high_frequency_factor": 4.0,
        "original_length": 64,
    }
    with pytest.raises(
        UserError, match=r"model.position.scaling needs kind = 'rotary', not 'alibi'"
    ):
        bind(
            ModelConfig,
            plain(tiny_config()) | {"position": {"kind": "alibi", "scaling": scaling}},
            "model",
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"head": {"mtp_depth": 1}, "structure": "prefix"},
            "head.mtp_depth = 1 needs structure = 'decoder', not 'pre",
        ),
        (
            {
                "experts": {
                    "num_experts": 4,
                    "experts_per_token": 2,
                    "hidden_dim": 8,
                    "bias_speed": 0.1,
                }
            },
            "experts.bias_speed = 0.1 needs selection_bias = True.",
        ),
        (
            {"structure": "encoder_decoder", "encoder_layers": 1, "first_layers": [{}, {}]},
            "first_layers are 2, more than encoder_layers = 1.",
        ),
        (
            {
                "position": {
                    "rotary_dim": 2,
                    "scaling": {"kind": "dynamic", "factor": 2.0, "original_length": 8},
                }
            },
            "position.scaling.kind = 'dynamic' needs at least 4 rotary columns of a head, not 2.",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(UserError) as caught:
        bind(ModelConfig, plain(tiny_config()) | changes)
    assert str(caught.value).startswith(message)


def test_config_survives_the_way_to_plain_values_and_back():
    assert bind(ModelConfig, plain(tiny_config())) == tiny_config()
