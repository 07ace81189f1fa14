"""What is read of prompts before the first new token."""

import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import UserError
from research.data.tokenizers.byte import ByteTokenizer
from research.inference.prompts import Prompts, encode, read_prompts
from tests.models.variants import VARIANTS
from tests.tiny import random_params, random_tokens


@pytest.mark.parametrize("name", ["dynamic", "longrope", "linear"])
@pytest.mark.parametrize("length", [5, 9])
def test_padding_behind_a_prompt_changes_nothing(name: str, length: int):
    config = VARIANTS[name]  # whose rotary rules change for documents of more than 6 tokens
    params, tokens = random_params(config), random_tokens(1, length)
    found = []
    for padding in (0, 7):
        prompts = Prompts(jnp.asarray(np.pad(tokens, ((0, 0), (0, padding)))), jnp.asarray([length]))
        found.append(read_prompts(params, prompts, config=config, slots=16)[0])
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)


class Bare(ByteTokenizer):
    """Bytes without any id that is no text."""

    bos_id = eos_id = start_id = None


@pytest.mark.parametrize("name", ["windows", "encoder-decoder"])
def test_an_empty_prompt_is_refused_where_nothing_can_stand_for_it(name: str):
    with pytest.raises(UserError, match="--prompt = '' is empty"):
        encode(VARIANTS[name], Bare(), [""], 5)
    assert encode(VARIANTS[name], ByteTokenizer(), [""], 5)[0].lengths.shape == (1,)
