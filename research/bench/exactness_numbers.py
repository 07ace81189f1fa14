"""Answers compared as numbers, where bits may differ: with the whole text, with pages of other
sizes, and on several devices.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from research.bench.exactness_answers import Found, largest
from research.bench.exactness_models import boxed_shapes
from research.bench.exactness_runs import start_engine
from research.data.tokenizers import ByteTokenizer
from research.inference.answers import Answer
from research.inference.engine import Engine
from research.inference.logits import logits, model_inputs
from research.inference.requests import Request
from research.inference.serve_config import ServeConfig
from research.inference.slots import LogprobKind
from research.models.config import ModelConfig
from research.parallel.mesh import make_mesh
from research.parallel.mesh_config import MeshConfig
from research.parallel.rules import param_shardings

# Tokens of a page, beside the usual number.
PAGE_SIZES = (8, 32)
# Two replicas, each over two devices.
MESH = MeshConfig(data=2, tensor=2)
NUM_DEVICES = math.prod(MESH.sizes().values())


def page_size_error(
    config: ModelConfig,
    params: Any,
    requests: Sequence[Request],
    wanted: Sequence[Found],
    serve: ServeConfig,
) -> float:
    """Returns the largest difference of a number in answers of engines with pages of other sizes;
    infinite where a token differs.

    Args:
      config: of the model.
      params: its parameters.
      requests: all, which are answered at a time.
      wanted: their answers.
      serve: how the engines run.
    """
    distances = []
    for size in PAGE_SIZES:
        engine = start_engine(config, params, dataclasses.replace(serve, page_size=size))
        distances.append(_distance(engine, requests, wanted))
    return largest(distances)


def mesh_error(
    config: ModelConfig,
    params: Any,
    requests: Sequence[Request],
    wanted: Sequence[Found],
    serve: ServeConfig,
) -> float:
    """As `page_size_error`, of an engine over the first `NUM_DEVICES` devices."""
    mesh = make_mesh(MESH, jax.devices()[:NUM_DEVICES])
    shardings = param_shardings(boxed_shapes(config), mesh, shard_width=False)
    placed = jax.device_put(params, shardings)
    engine = Engine(config, placed, ByteTokenizer(), serve, mesh)
    return _distance(engine, requests, wanted)


def _distance(engine: Engine, requests: Sequence[Request], wanted: Sequence[Found]) -> float:
    answers = engine.run(requests)
    distances = [Found.of(each).distance(one) for each, one in zip(answers, wanted, strict=True)]
    return largest(distances)


def largest_error(
    config: ModelConfig, params: Any, requests: Sequence[Request], answers: Sequence[Answer]
) -> tuple[int, float]:
    """Returns how many log-probabilities of answers are compared with those of the model that reads
    prompt and answer at once, and the largest difference.
    """
    scalings = [config.position_of(layer).scaling for layer in config.layers()]
    by_length = any(scaling is not None and scaling.by_length for scaling in scalings)
    errors = []
    for request, answer in zip(requests, answers, strict=True):
        for sample in answer.samples:
            tokens = sample.completion().tokens
            is_raw = request.logprob_kind is LogprobKind.RAW
            # A text that ended before its limit was read as one of the limit.
            is_whole = len(tokens) == request.max_tokens
            if not is_raw or not tokens or sample.error or (by_length and not is_whole):
                continue
            logprobs = [each.logprob for each in sample.logprobs]
            expected = _whole_logprobs(config, params, request.ids, tokens)
            errors += np.abs(np.array(logprobs) - expected).tolist()
    return len(errors), largest(errors)


def _whole_logprobs(
    config: ModelConfig, params: Any, ids: Sequence[int], tokens: Sequence[int]
) -> Float[np.ndarray, "tokens"]:
    """Returns the log-probabilities of an answer after a prompt, of one run over both."""

    # All texts are padded to one length: [7, 8] -> ids [7, 8, 0, …], segments [1, 1, 0, …]
    def padded(row: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        missing = config.max_length - len(row)
        real = np.ones(len(row), np.int32)
        return np.pad(row, (0, missing))[None], np.pad(real, (0, missing))[None]

    start = ids
    encoder = {"encoder_tokens": None, "encoder_segments": None}
    if config.structure == "encoder_decoder":
        start = (config.decoder_start_id,)
        encoder = dict(zip(encoder, padded(ids), strict=True))
    whole, segments = padded([*start, *tokens])
    inputs = model_inputs(config, whole, segments, **encoder, types=None, prefix=None)
    logprobs = jax.nn.log_softmax(logits(config, params, inputs), axis=-1)[0]
    places = np.arange(len(start), len(start) + len(tokens))
    return np.asarray(logprobs)[places - 1, list(tokens)]
