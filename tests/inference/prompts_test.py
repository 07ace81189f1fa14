"""What is read of prompts before the first new token."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import UserError
from research.data.tokenizers.byte import ByteTokenizer
from research.inference.prefill import prefill
from research.inference.prompts import Prompts, encode
from tests.models.variants import VARIANTS
from tests.tiny import random_params, random_tokens, stack, tiny_config


@pytest.mark.fast_cases("5-dynamic", "9-longrope")
@pytest.mark.parametrize("name", ["dynamic", "longrope", "linear"])
@pytest.mark.parametrize("length", [5, 9])
def test_padding_behind_a_prompt_changes_nothing(name: str, length: int):
    config = VARIANTS[name]  # whose rotary rules change for documents of more than 6 tokens
    params, tokens = random_params(config), random_tokens(1, length)
    found = []
    for padding in (0, 7):
        prompts = Prompts(
            jnp.asarray(np.pad(tokens, ((0, 0), (0, padding)))), jnp.asarray([length])
        )
        found.append(prefill(params, prompts, config=config, slots=16)[0])
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)


@pytest.mark.parametrize("rule", ["dynamic", "longrope"])
def test_an_encoder_reads_a_prompt_beside_a_longer_one_as_alone(rule: str):
    config = dataclasses.replace(
        VARIANTS["sinusoidal encoder-decoder"], position=VARIANTS[rule].position
    )
    params, tokens = random_params(config), random_tokens(2, 9)
    start = jnp.zeros((2, 1), jnp.int32), jnp.ones(2, jnp.int32)

    def first_logits(rows: int, width: int, lengths: list[int]):
        prompts = Prompts(
            start[0][:rows],
            start[1][:rows],
            jnp.asarray(tokens[:rows, :width]),
            jnp.asarray(lengths),
        )
        return prefill(params, prompts, config=config, slots=16)[0]

    # The rules change for more than 6 tokens, which the shorter prompt has only with its padding.
    np.testing.assert_allclose(first_logits(2, 9, [5, 9])[:1], first_logits(1, 5, [5]), atol=1e-5)
    assert (
        np.abs(first_logits(2, 9, [8, 9])[:1] - first_logits(1, 5, [5])).max() > 1e-2
    )  # the control


@pytest.mark.parametrize("loop", ["auto", "scan", "unroll"])
def test_the_cache_has_the_form_of_the_parameters_whatever_the_config_says(loop: str):
    config = tiny_config(layer_loop=loop)
    params, prompts = (
        random_params(tiny_config()),
        Prompts(jnp.asarray(random_tokens(1, 5)), jnp.asarray([5])),
    )
    (logits, cache), (others, stacked) = (
        prefill(each, prompts, config=config, slots=8)
        for each in (params, stack(params, config.num_layers))
    )
    assert (len(cache.layers), len(stacked.layers)) == (2, 1)
    np.testing.assert_allclose(others, logits, atol=1e-5)


class Bare(ByteTokenizer):
    """Bytes without any id that is no text."""

    bos_id = eos_id = document_start_id = None


@pytest.mark.parametrize("name", ["windows", "encoder-decoder"])
def test_an_empty_prompt_is_refused_where_nothing_can_stand_for_it(name: str):
    config = dataclasses.replace(VARIANTS[name], vocab_size=ByteTokenizer().vocab_size)
    with pytest.raises(UserError, match="prompts = '' is empty"):
        encode(config, Bare(), [""], [5])
    assert encode(config, ByteTokenizer(), [""], [5])[0].lengths.shape == (1,)
    with pytest.raises(
        UserError, match=r"'<s>' is the tokenizer's id 256, and the model's ids lie in \[0, 48\)"
    ):
        encode(VARIANTS[name], ByteTokenizer(), [""], [5])
