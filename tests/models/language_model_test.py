"""Losses and generation know a `LanguageModel`, not the transformer: a table of bigrams is trained
and generates.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.trees import named_leaves
from research.data.tokenizers.byte import ByteTokenizer
from research.inference.generate import generate
from research.inference.sampling_config import SamplingConfig
from research.models.cache import Cache
from research.models.language_model import LanguageModel, language_model, register_model
from research.models.reports import no_reports
from research.models.transformer import LogitTerms, Output, Transformer
from research.models.transformer_model import TransformerModel
from research.training.language_model import LanguageModelLoss
from tests.tiny import random_batch, random_params, summed, tiny_config


@dataclasses.dataclass(frozen=True)
class BigramConfig:
    """A table of logits, one row an id; the fields that the engine reads of any model."""

    vocab_size: int
    max_length: int = 64
    structure: Literal["decoder"] = "decoder"


@dataclasses.dataclass(frozen=True)
class Bigram:
    config: BigramConfig

    def init(self, key: jax.Array) -> Any:
        size = self.config.vocab_size
        return {"table": nn.LogicallyPartitioned(jnp.zeros((size, size)), ("vocab", "embed"))}

    def hidden(self, params: Any, inputs: Any, *, cache: Any = None, key: Any = None) -> Output:
        return Output(jax.nn.one_hot(inputs["tokens"], self.config.vocab_size), cache, no_reports())

    def projection(self, params: Any, hidden: jax.Array) -> LogitTerms:
        return LogitTerms(hidden, params["table"], None)

    def empty_cache(
        self,
        params: Any,
        batch: int,
        slots: int,
        memory_segments: Any = None,
        page_table: Any = None,
        cache_dtype: str | None = None,
    ) -> Cache:
        return Cache(())

    def flops_per_token(self, sequence_length: int, encoder_length: int = 0) -> float:
        return 6.0 * self.config.vocab_size**2


BYTES = ByteTokenizer()
register_model(BigramConfig, lambda config, platform: Bigram(config))


def test_a_bigram_table_learns_what_follows_what_by_the_loss_of_any_model():
    config = BigramConfig(vocab_size=48)
    loss = summed(LanguageModelLoss(config))
    params = nn.unbox(language_model(config).init(jax.random.key(0)))
    batch = jax.tree.map(jnp.asarray, random_batch(2, 16))
    batch["targets"] = (batch["tokens"] * 5 + 3) % 48

    @jax.jit
    def step(params: Any) -> tuple[Any, jax.Array]:
        (_, sums), gradient = jax.value_and_grad(lambda p: loss(p, batch, None), has_aux=True)(
            params
        )
        return jax.tree.map(lambda p, g: p - g, params, gradient), sums["loss"] / 32

    losses = []
    for _ in range(30):
        params, value = step(params)
        losses.append(float(value))
    assert losses[0] == pytest.approx(np.log(48), rel=1e-5)
    assert losses[-1] < 0.3
    seen = np.unique(np.asarray(batch["tokens"]))
    np.testing.assert_array_equal(
        np.argmax(np.asarray(params["table"])[seen], axis=1), (seen * 5 + 3) % 48
    )


def test_a_bigram_table_generates_through_the_engine():
    config = BigramConfig(vocab_size=BYTES.vocab_size)
    table = np.zeros((config.vocab_size,) * 2, np.float32)
    for first, second in zip(b"abcd", b"bcda", strict=True):
        table[first, second] = 9.0
    text = generate(
        config,
        {"table": jnp.asarray(table)},
        BYTES,
        ["xa", "c"],
        SamplingConfig(temperature=0.0, max_tokens=5),
    )
    assert [each.text for each in text] == ["bcdab", "dabcd"]


def test_the_class_of_the_config_chooses_the_model():
    model = language_model(tiny_config(), "tpu")
    assert isinstance(model, TransformerModel)
    assert isinstance(model, LanguageModel)
    assert isinstance(language_model(BigramConfig(4), "tpu"), Bigram)
    shapes = named_leaves(nn.unbox(jax.eval_shape(model.init, jax.random.key(0))))
    assert shapes["layers/mlp/up/kernel"].shape == (2, 16, 24)  # scanned on a TPU

    @dataclasses.dataclass(frozen=True)
    class OtherConfig(BigramConfig):
        pass

    with pytest.raises(AssertionError, match="OtherConfig is no config of a registered model"):
        language_model(OtherConfig(4))


def test_embeddings_may_stand_in_the_place_of_ids():
    config = tiny_config()
    params = jax.tree.map(jnp.asarray, random_params(config))
    batch = jax.tree.map(jnp.asarray, random_batch(2, 8))
    positions = {name: batch[name] for name in ("positions", "segments")}
    model = Transformer(config)

    @jax.jit
    def states(params: Any, embeddings: jax.Array) -> jax.Array:
        return model.apply({"params": params}, positions, embeddings=embeddings).hidden

    expected = model.apply({"params": params}, positions | {"tokens": batch["tokens"]}).hidden
    embeddings = params["embed"]["embedding"][batch["tokens"]]
    np.testing.assert_allclose(states(params, embeddings), expected, atol=1e-5)
    assert np.abs(states(params, 2 * embeddings) - expected).max() > 0.01
