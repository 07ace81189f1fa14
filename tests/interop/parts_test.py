"""A config.json in parts: claims about `interop.parts`, `interop.windows` and `interop.rotary`."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.errors import UserError
from research.interop.parts import fixed, named, renamed_field, shortest_pattern
from research.interop.rotary import position, write_position
from research.interop.windows import layer_windows
from research.models.config import (
    AttentionConfig,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    PositionConfig,
    RopeScalingConfig,
)

MODEL = ModelConfig(
    vocab_size=8,
    num_layers=2,
    embed_dim=8,
    max_length=8,
    attention=AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=8),
    mlp=MlpConfig(hidden_dim=8),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([None, 4]), st.booleans()), min_size=1, max_size=12))
def test_shortest_pattern_gives_the_layers_it_was_made_of(rows):
    layers = [{"window": window, "experts": experts} for window, experts in rows]
    found = shortest_pattern(layers)
    first, pattern = found["first_layers"], found["pattern"]
    again = [*first, *(pattern[i % len(pattern)] for i in range(len(layers) - len(first)))]
    assert again == layers
    assert len({layer["experts"] for layer in pattern}) == 1


@pytest.mark.parametrize(
    ("windows", "first", "period"),
    [
        ([4] * 6, 0, 1),
        ([4, None] * 3, 0, 2),
        (([4] * 5 + [None]) * 4 + [4, 4], 0, 6),  # Gemma 3 1B
        ([None] * 3 + [4] * 5, 3, 1),
    ],
)
def test_shortest_pattern_is_as_short_as_it_can_be(windows, first, period):
    found = shortest_pattern([{"window": window} for window in windows])
    assert (len(found["first_layers"]), len(found["pattern"])) == (first, period)


def test_a_named_part_reads_and_writes_groups_and_refuses_one_that_is_not_there():
    part = named({"width": "mlp.hidden_dim", "experts": "experts.num_experts"}, experts=4)
    assert part.required == ("width",)
    assert part.read({"width": 3, "experts": 5}) == {"mlp.hidden_dim": 3, "experts.num_experts": 5}
    with pytest.raises(UserError, match="experts is not set"):
        part.write(MODEL)
    assert fixed({"norm.bias": False}).write(MODEL) == {}


def test_a_field_of_two_names_is_read_by_either_and_must_not_contradict_itself():
    part = renamed_field("new", "old", "mlp.hidden_dim", default=7)
    assert (
        part.read({"new": None, "old": 3})
        == part.read({"new": 3, "old": 3})
        == {"mlp.hidden_dim": 3}
    )
    assert part.read({"new": None, "old": None}) == {"mlp.hidden_dim": 7}
    assert part.write(MODEL) == {"new": 8}
    with pytest.raises(UserError, match="new = 1 must equal old = 2"):
        part.read({"new": 1, "old": 2})


def test_windows_go_out_as_layer_types():
    part = layer_windows(16, lambda fields, i: i >= fields["from"], switch=True)
    config = ModelConfig(**{**vars(MODEL), "pattern": (LayerConfig(), LayerConfig(window=4))})
    fields = part.write(config)
    assert fields == {
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention"],
        "use_sliding_window": True,
    }
    assert part.read({**fields, "num_hidden_layers": 2}) == {"layers.window": [None, 4]}
    off = {**fields, "use_sliding_window": False, "num_hidden_layers": 2}
    assert part.read(off) == {"layers.window": [None, None]}
    older = {
        "sliding_window": 4,
        "use_sliding_window": True,
        "layer_types": None,
        "num_hidden_layers": 2,
        "from": 1,
    }
    assert part.read(older) == {"layers.window": [None, 4]}


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        RopeScalingConfig(kind="linear", factor=2.0),
        RopeScalingConfig(
            kind="yarn", factor=2.0, original_length=16, amplitude=1.25, truncate=False
        ),
        RopeScalingConfig(kind="llama3", factor=2.0, original_length=16),
        RopeScalingConfig(
            kind="longrope", original_length=16, short_factors=(1.0,), long_factors=(2.0,)
        ),
    ],
)
def test_a_position_goes_out_and_comes_back(scaling):
    values = position(write_position(PositionConfig(theta=5e5, scaling=scaling)), longest=32)
    again = values.pop("scaling")
    assert (None if again is None else RopeScalingConfig(**again)) == scaling
    assert values == {"kind": "rotary", "theta": 5e5}
