"""What is read of prompts before the first new token."""

import jax.numpy as jnp
import numpy as np
import pytest

from research.inference.prompts import Prompts, read_prompts
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
