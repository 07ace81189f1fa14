"""Generation by every structure: prefix decoders and encoder-decoders continue as their logits say;
encoders refuse.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import UserError
from research.data.tokenizers.byte import ByteTokenizer
from research.inference.answers import Answer
from research.inference.beam_config import BeamConfig
from research.inference.beam_generate import beam_generate
from research.inference.engine import Engine
from research.inference.generate import generate
from research.inference.requests import Request
from research.inference.sampling_config import SamplingConfig
from research.inference.serve_config import ServeConfig
from research.models.config import ModelConfig
from research.models.transformer import Transformer
from tests.models.variants import VARIANTS
from tests.tiny import random_params

BYTES, GREEDY = ByteTokenizer(), SamplingConfig(temperature=0.0, max_tokens=5)
PROMPTS = ["ab", "a longer prompt"]
STRUCTURES = (
    "prefix",
    "encoder-decoder",
    "post-norm encoder-decoder",
    "sinusoidal encoder-decoder",
)


def model(name: str) -> tuple[ModelConfig, dict]:
    config = dataclasses.replace(
        VARIANTS[name], vocab_size=BYTES.vocab_size, decoder_start_id=3 * ("encoder" in name)
    )
    params = random_params(config, seed=3)
    if (
        config.encoder_layers
    ):  # random weights make what the encoder says too faint to change a text
        for layer in range(config.num_layers):
            params[f"layers_{layer}"]["cross_attention"]["out"]["kernel"] *= 8
    return config, jax.tree.map(jnp.asarray, params)


def greedy_by_hand(config: ModelConfig, params: dict, prompt: str) -> list[int]:
    """Reads everything anew for each token, one prompt alone, without a cache."""
    source = [i for i in (BYTES.bos_id, *BYTES.encode(prompt), BYTES.eos_id) if i is not None]
    ids = (
        [config.decoder_start_id]
        if config.encoder_layers
        else [BYTES.document_start_id, *BYTES.encode(prompt)]
    )
    inputs = {"encoder_tokens": jnp.asarray([source])} if config.encoder_layers else {}
    length = len(ids) + GREEDY.max_tokens

    @jax.jit
    def next_logits(tokens: jax.Array, last: jax.Array) -> jax.Array:
        """At place `last` of a row [length] whose later places are not written yet: none may see
        them.
        """
        row = {"tokens": tokens[None], "positions": jnp.arange(length)[None], **inputs}
        if config.structure == "prefix":
            row["prefix"] = (jnp.arange(length) < len(ids)).astype(jnp.int32)[None]

        def apply(module: Transformer) -> jax.Array:
            return module.logits(module(row).hidden)[0, last]

        return Transformer(config).apply({"params": params}, method=apply)

    found: list[int] = []
    for _ in range(GREEDY.max_tokens):
        tokens = ids + found
        logits = next_logits(
            jnp.asarray(tokens + [0] * (length - len(tokens))), jnp.asarray(len(tokens) - 1)
        )
        found.append(int(jnp.argmax(logits[: BYTES.vocab_size])))
        if found[-1] == BYTES.eos_id:
            break
    return found


@pytest.mark.fast_cases("prefix", "encoder-decoder")
@pytest.mark.parametrize("name", STRUCTURES)
def test_greedy_text_is_what_whole_reading_gives(name: str):
    config, params = model(name)
    found = generate(config, params, BYTES, PROMPTS, GREEDY)
    expected = [greedy_by_hand(config, params, prompt) for prompt in PROMPTS]
    assert [list(text.tokens) for text in found] == expected
    assert expected[0] != expected[1]
    with_one_beam = beam_generate(
        config, params, BYTES, PROMPTS, BeamConfig(num_beams=1, max_tokens=5)
    )
    assert [list(best[0].tokens) for best in with_one_beam] == expected


@pytest.mark.fast_cases("encoder-decoder")
@pytest.mark.parametrize("name", STRUCTURES[1:])
def test_beams_of_an_encoder_decoder_do_not_depend_on_the_batch(name: str):
    config, params = model(name)
    beams = BeamConfig(num_beams=3, max_tokens=5, num_return=2, no_repeat_ngram=2)
    together = beam_generate(config, params, BYTES, PROMPTS, beams)
    for prompt, found in zip(PROMPTS, together, strict=True):
        (alone,) = beam_generate(config, params, BYTES, [prompt], beams)
        assert [beam.tokens for beam in found] == [beam.tokens for beam in alone]
        np.testing.assert_allclose(
            [beam.score for beam in found], [beam.score for beam in alone], atol=1e-5
        )
    assert together[0][0].tokens != together[1][0].tokens


def test_an_encoder_asked_for_text_says_what_it_is():
    config, params = model("encoder")
    for ask in (
        lambda: generate(config, params, BYTES, PROMPTS, GREEDY),
        lambda: beam_generate(config, params, BYTES, PROMPTS, BeamConfig()),
    ):
        with pytest.raises(UserError, match=r"model.structure = 'encoder' makes no text"):
            ask()


def test_a_preempted_request_does_not_read_the_source_of_who_took_its_row():
    config, params = model("encoder-decoder")
    config = dataclasses.replace(config, max_length=96)
    serve = ServeConfig(slots=5, tokens=96, rows=8, tiles=(8,))

    def request(ids: tuple[int, ...], count: int, priority: int, samples: int = 1) -> Request:
        sampling = SamplingConfig(max_tokens=count, min_tokens=count, seed=3)
        return Request(ids, sampling, count=samples, priority=priority)

    def tokens(answer: Answer) -> list[tuple[int, ...]]:
        return [sample.completion().tokens for sample in answer.samples]

    pair = request((5, 9, 6, 8), 40, 0, samples=2)
    # Three that take all six pages from the pair; one ends before the others, which end together.
    first = [request((40, 41, 42 + count), count, 1) for count in (31, 31, 20)]
    others = [request((250, 60, 170, 80, last), 15, 1) for last in (190, 7)]
    alone = []
    for each in (pair, *first, *others):
        [answer] = Engine(config, params, BYTES, serve).run([each])
        alone.append(tokens(answer))

    engine = Engine(config, params, BYTES, serve)
    answers = [engine.submit(pair)]
    for _ in range(4):
        engine.run_step()
    samples = answers[0].samples
    rows = {sample.memory for sample in samples}
    answers += engine.submit_all(first)
    while any(sample.sequence.slot is not None for sample in samples):
        assert engine.run_step()
    answers += engine.submit_all(others)
    [taker] = answers[-2].samples
    while taker.memory is None:
        assert engine.run_step()
    # Their row of the memory is another's before both come back in one step.
    assert {taker.memory} == rows
    assert [sample.sequence.slot for sample in samples] == [None, None]
    while engine.run_step():
        pass
    assert [tokens(answer) for answer in answers] == alone
