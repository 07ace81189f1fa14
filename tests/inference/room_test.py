"""What a step reads is of when it was begun, and a search has room where its longest answer has."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from research.data.tokenizers import ByteTokenizer
from research.inference.beam_config import BeamConfig
from research.inference.engine import Engine
from research.inference.requests import Request
from research.inference.serve_config import ServeConfig
from tests.tiny import random_params, tiny_config

CONFIG = tiny_config(vocab_size=260, max_length=128)
SERVE = ServeConfig(slots=4, tokens=512, rows=16, tiles=(2, 8), top_logprobs=8)


def searched(params, serve: ServeConfig, most_steps: int) -> list[tuple[tuple[int, ...], float]]:
    engine = Engine(CONFIG, params, ByteTokenizer(), serve)
    beams = BeamConfig(num_beams=4, max_tokens=60, num_return=4)
    answer = engine.submit(Request(tuple(range(40)), beams=beams))
    for _ in range(most_steps):
        engine.run_step()
    assert answer.finished
    return [(beam.tokens, beam.score) for beam in answer.beams]


def test_a_search_ends_where_its_hypotheses_have_room_one_after_the_other():
    params = random_params(CONFIG)
    # Four hypotheses of up to seven pages, of which two are the prompt's: 22 pages, or 7.
    roomy = searched(params, SERVE, 400)
    narrow = ServeConfig(slots=4, tokens=112, rows=16, tiles=(2, 8), top_logprobs=8)
    assert searched(params, narrow, 4000) == roomy


def read_after_a_change(put: Callable[[np.ndarray], jax.Array]) -> int:
    """What a device that is busy reads of an array of ones that the host fills with twos."""
    busy = jax.lax.fori_loop(0, 300, lambda _, x: (x @ x) * 1e-3, jnp.ones((300, 300)))
    memory = np.ones(1024, np.int32)
    # JAX takes memory as it is where its address is a multiple of 64: 16 numbers.
    start = -(memory.ctypes.data // 4) % 16
    ids = memory[start : start + 32].reshape(4, 8)
    found = put(ids)
    ids[:] = 2
    busy.block_until_ready()
    return int(np.asarray(found).max())


def test_a_step_reads_the_pages_of_when_it_was_begun():
    [replica] = Engine(CONFIG, random_params(CONFIG), ByteTokenizer(), SERVE).replicas
    runner = replica._runner
    for _ in range(10):
        assert read_after_a_change(lambda ids: runner.tables.on_device([ids]).ids) == 1
    # The control: JAX reads the memory of a NumPy array when the device comes to it.
    assert 2 in [read_after_a_change(jnp.asarray) for _ in range(50)]
