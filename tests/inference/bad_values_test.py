"""`debug_nans` names the first value that is no number, and only the request that has it ends."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.trees import named_leaves, nested
from research.data.tokenizers import ByteTokenizer
from research.inference.bad_values import NONE, first_bad_value
from research.inference.beam_config import BeamConfig
from research.inference.engine import Engine
from research.inference.requests import Request
from research.inference.sampling_config import SamplingConfig
from research.inference.serve_config import ServeConfig
from research.models.canonical_params import stack_layers
from research.models.transformer_model import TransformerModel
from tests.models.variants import VARIANTS
from tests.tiny import random_params, tiny_config

BYTES = ByteTokenizer()
CONFIG = tiny_config(vocab_size=260, max_length=128, num_layers=3)
SERVE = ServeConfig(slots=3, tokens=512, rows=16, tiles=(2, 16), debug_nans=True)
DRAWN = SamplingConfig(max_tokens=8, temperature=1.0, seed=3)
# The token whose value in one column overflows; all others have a zero there.
LOUD = 77
COLUMN = 5


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def loud(params):
    """Answers with parameters that overflow after one token."""
    return Engine(CONFIG, overflowing(params), BYTES, SERVE)


def changed(params, **arrays):
    """Parameters with some arrays changed, by names with `__` for slashes."""
    named = {name: np.array(leaf) for name, leaf in named_leaves(params).items()}
    for name, change in arrays.items():
        change(named[name.replace("__", "/")])
    return jax.tree.map(jnp.asarray, nested(named))


def overflowing(params):
    """Parameters with which the first layer's `up` overflows after one token, and is what it was
    after the others.
    """

    def embed(table):
        table[:, COLUMN] = 0.0
        table[LOUD] = 0.0
        table[LOUD, COLUMN] = 1.0

    def silence(out):
        out[..., COLUMN] = 0.0

    def overflow(up):
        up[COLUMN, 7] = 3e38

    return changed(
        params,
        embed__embedding=embed,
        layers_0__attention__out__kernel=silence,
        layers_0__mlp__up__kernel=overflow,
    )


def error_of(answer) -> str:
    [sample] = answer.samples
    assert sample.error is not None
    return sample.error


def drawn(answer):
    [sample] = answer.samples
    assert sample.error is None
    return [(each.token, each.logprob) for each in sample.logprobs]


@pytest.mark.parametrize("name", ["layers_0/attention/query", "layers_2/mlp/up", "final_norm"])
def test_a_parameter_that_is_no_number_is_named(params, name):
    array = f"{name}/scale" if name == "final_norm" else f"{name}/kernel"
    index = {"final_norm": (3,), "layers_2/mlp/up": (3, 7)}.get(name, (3, 1, 2))
    bad = changed(
        params, **{array.replace("/", "__"): lambda leaf: leaf.__setitem__(index, np.nan)}
    )
    [answer] = Engine(CONFIG, bad, BYTES, SERVE).run([Request((5, 6, 7), DRAWN)])
    column = list(index[1:]) or list(index)
    assert error_of(answer) == (
        f"its logits are not numbers: nan at {[0, *column]} of {name}, where {array} is nan at "
        f"{list(index)}"
    )


def test_an_overflow_ends_its_request_alone_and_names_token_layer_and_array(params, loud, caplog):
    others = [Request((5, 9, 6), DRAWN), Request((8, 3), DRAWN)]
    with caplog.at_level(logging.ERROR):
        bad, *found = loud.run([Request((5, 9, LOUD, 6), DRAWN), *others])
    assert error_of(bad) == ("its logits are not numbers: inf at [2, 7] of layers_0/mlp/up")
    # Bit for bit what they are without a neighbour, and no compilation is reported.
    alone = Engine(CONFIG, overflowing(params), BYTES, dataclasses.replace(SERVE, debug_nans=False))
    assert [drawn(each) for each in found] == [drawn(*alone.run([each])) for each in others]
    # The control: without the flag no layer is named.
    assert error_of(*alone.run([Request((5, LOUD, 6), DRAWN)])) == "its logits are not numbers"
    assert not caplog.records


def test_a_token_that_was_drawn_is_named_by_its_place(loud):
    sampling = dataclasses.replace(DRAWN, logit_bias=((LOUD, 1e9),))
    [answer] = loud.run([Request((5, 9, 6), sampling)])
    # The prompt's tokens have the places 0 to 2.
    assert error_of(answer).endswith("inf at [3, 7] of layers_0/mlp/up")
    assert len(answer.samples[0].logprobs) == 1


def test_a_search_says_it_too(loud):
    [answer] = loud.run([Request((5, LOUD, 6), beams=BeamConfig(num_beams=2, max_tokens=4))])
    assert answer.error.endswith("inf at [1, 7] of layers_0/mlp/up")


def test_layers_that_are_stacked_are_named_one_by_one(params):
    bad = overflowing(params)
    stacked = nested(stack_layers(named_leaves(bad)))
    found = [
        first_bad_value(config, tree, Request((5, LOUD), DRAWN), (5, LOUD), 10)
        for config, tree in (
            (CONFIG, bad),
            (dataclasses.replace(CONFIG, layer_loop="scan"), stacked),
        )
    ]
    assert found == ["inf at [1, 7] of layers_0/mlp/up"] * 2


@pytest.mark.fast_cases("experts", "prefix")
@pytest.mark.parametrize("name", ["experts", "prefix", "latent", "relative", "encoder-decoder"])
def test_every_structure_is_read_and_a_whole_one_has_no_such_value(name):
    config = VARIANTS[name]
    params = random_params(config)
    request = Request((5, 9, 6), DRAWN)
    tokens = (1, 2) if config.structure == "encoder_decoder" else request.ids
    assert first_bad_value(config, params, request, tokens, 11) == NONE
    table = np.array(params["embed"]["embedding"])
    table[9, 0] = np.nan
    bad = {**params, "embed": {"embedding": jnp.asarray(table)}}
    found = first_bad_value(config, bad, request, tokens, 11)
    assert found == "nan at [1, 0] of embed, where embed/embedding is nan at [9, 0]"


def test_a_text_is_read_again_with_its_adapter(monkeypatch):
    # Of no other test: what is compiled here has an adapter.
    config = dataclasses.replace(CONFIG, max_length=116)
    hidden = TransformerModel.hidden

    def adapted(self, params, inputs, **others):
        """Of two adapters the second has no numbers in one layer."""
        named = named_leaves(params)
        is_broken = jnp.any(inputs["adapters"] == 2)
        named["layers_1/mlp/up/kernel"] += jnp.where(is_broken, jnp.nan, 0.0)
        return hidden(self, nested(named), inputs, **others)

    monkeypatch.setattr(TransformerModel, "hidden", adapted)
    digests = {"whole": b"1", "broken": b"2"}
    engine = Engine(config, random_params(config), BYTES, SERVE, adapters=digests)
    found = [engine.run([Request((5, 6), DRAWN, adapter=name)])[0] for name in ("", "whole")]
    assert all(len(drawn(answer)) > 0 for answer in found)
    [answer] = engine.run([Request((5, 6), DRAWN, adapter="broken")])
    # The parameter there is a number without the adapter, and so is not named.
    assert error_of(answer) == "its logits are not numbers: nan at [0, 0] of layers_1/mlp/up"
    search = Request((5, 6), beams=BeamConfig(num_beams=2, max_tokens=4), adapter="broken")
    [answer] = engine.run([search])
    assert answer.error.endswith("nan at [0, 0] of layers_1/mlp/up")
