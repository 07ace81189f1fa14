"""An engine reads whole texts as its model does."""

import dataclasses

import jax
import numpy as np
import pytest

from research.core.errors import UserError
from research.data.tokenizers import ByteTokenizer
from research.inference.beam_config import BeamConfig
from research.inference.engine import Engine
from research.inference.requests import Request
from research.inference.serve_config import ServeConfig
from research.recipes.loaded import LoadedModel
from tests.models.variants import VARIANTS
from tests.tiny import random_params, tiny_config

BYTES = ByteTokenizer()
CONFIG = tiny_config(vocab_size=260, max_length=96)
SERVE = ServeConfig(slots=2, tokens=256, rows=8, tiles=(8,), top_logprobs=4)
ROWS = [[1, 2, 3], [9, 8, 7, 6, 5]]


def test_an_engine_embeds_and_scores_as_the_model_does_and_by_its_newest_parameters():
    params = random_params(CONFIG)
    engine = Engine(CONFIG, params, BYTES, SERVE)
    for current in (params, jax.tree.map(lambda leaf: leaf * 0.5, params)):
        engine.update_params(current)
        model = LoadedModel(CONFIG, current, BYTES, 0)
        np.testing.assert_array_equal(engine.embed(ids=ROWS), model.embed(ids=ROWS))
        assert engine.score(ids=ROWS, top=2) == model.score(ids=ROWS, top=2)


def test_an_encoder_s_engine_embeds_and_makes_no_text():
    config = dataclasses.replace(VARIANTS["encoder"], vocab_size=260, max_length=96)
    params = random_params(config)
    engine = Engine(config, params, BYTES, SERVE)
    expected = LoadedModel(config, params, BYTES, 0).embed(ids=ROWS)
    np.testing.assert_array_equal(engine.embed(ids=ROWS), expected)
    with pytest.raises(UserError, match=r"model\.structure = 'encoder' makes no text"):
        engine.submit(Request((1, 2)))
    engine.update_params(params)
    assert not engine.run_step()


def test_more_beams_than_likeliest_ids_are_refused():
    params = random_params(CONFIG)
    engine = Engine(CONFIG, params, BYTES, SERVE)
    # Of each hypothesis 2 continuations beside one that ends it.
    engine.submit(Request((1, 2), beams=BeamConfig(num_beams=2, max_tokens=2)))
    narrow = Engine(
        CONFIG, random_params(CONFIG), BYTES, dataclasses.replace(SERVE, top_logprobs=3)
    )
    with pytest.raises(UserError, match="num_beams = 2 must be at most 1"):
        narrow.submit(Request((1, 2), beams=BeamConfig(num_beams=2, max_tokens=2)))
