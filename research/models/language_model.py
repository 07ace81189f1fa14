"""What losses, generation and evaluation know of a model, whatever it is made of."""

import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.data.batch import Batch, ModelInputs
from research.models.config import ModelConfig
from research.models.transformer import LogitTerms, Output
from research.models.transformer_model import TransformerModel


@runtime_checkable
class LanguageModelConfig(Protocol):
    """What generation asks of the config of any model.

    Attributes:
      vocab_size: ids that a model knows, V.
      max_length: the longest sequence in tokens.
      structure: as of `ModelConfig`.
    """

    vocab_size: int
    max_length: int
    structure: str


def compute_dtype(config: LanguageModelConfig) -> jnp.dtype:
    """Returns the type that a model computes in; float32 where its config names none."""
    return jnp.dtype(getattr(config, "dtype", "float32"))


@runtime_checkable
class LanguageModel(Protocol):
    """A model of sequences of ids as pure functions of its parameters.

    Attributes:
      config: a frozen dataclass, whose class says which model it is.
    """

    config: LanguageModelConfig

    def init(self, key: jax.Array) -> Any:
        """Returns the initial parameters, each boxed with its logical axis names."""
        ...

    def hidden(
        self,
        params: Any,
        inputs: ModelInputs | Batch,
        *,
        cache: Any = None,
        key: jax.Array | None = None,
    ) -> Output:
        """Returns the hidden states of tokens, and the cache with the tokens in it where one is
        given.

        Args:
          params: unboxed.
          inputs: a batch, or what a model reads of one.
          cache: from `empty_cache`, with earlier tokens in it.
          key: of dropout; None drops nothing.
        """
        ...

    def projection(self, params: Any, hidden: Float[Array, "*batch D"]) -> LogitTerms:
        """Returns the logits of hidden states as a product that is not made yet."""
        ...

    def empty_cache(
        self,
        params: Any,
        batch: int,
        slots: int,
        memory_segments: Int[Array, "B M"] | None = None,
        page_table: Any = None,
        cache_dtype: str | None = None,
    ) -> Any:
        """Returns what generation hands from token to token, before the first one.

        Args:
          params: unboxed; a cache has the form of theirs.
          batch: sequences.
          slots: tokens that it can hold of each.
          memory_segments: of the tokens that an encoder reads, not 0 where they are real; None
              without an encoder.
          page_table: makes it a paged cache.
          cache_dtype: of the pages; None is the model's own type.

        Raises:
          UserError: the model has no cache of this type.
        """
        ...

    def flops_per_token(self, sequence_length: int, encoder_length: int = 0) -> float:
        """Returns the FLOPs of one training step, per token of the decoder."""
        ...


# The class of a config -> the model, from a config and the platform that it runs on.
Build = Callable[[Any, str | None], LanguageModel]
_MODELS: dict[type, Build] = {ModelConfig: TransformerModel.for_platform}


def register_model(config_class: type, build: Build) -> None:
    """Lets `language_model` build a model from configs of a class.

    Args:
      config_class: exactly this one, not those derived from it.
      build: takes a config and a platform, or None.
    """
    assert config_class not in _MODELS, f"{config_class.__name__} has a model already"
    _MODELS[config_class] = build


def language_model(config: LanguageModelConfig, platform: str | None = None) -> LanguageModel:
    """Returns the model that a config describes.

    Args:
      config: of a registered class.
      platform: `cpu`, `gpu` or `tpu`, which decides in what form parameters are made where the
        config leaves it open; None where none are made, for a model takes them in either form.
    """
    assert type(config) in _MODELS, f"{type(config).__name__} is no config of a registered model"
    return _MODELS[type(config)](config, platform)


def abstract_params(config: LanguageModelConfig, platform: str) -> Any:
    """Returns the shapes and types of a model's parameters, as a tree, in the form that suits a
    platform.
    """
    return nn.unbox(abstract_boxed_params(config, platform))


# Loading and conversion ask several times, and tracing a deep model takes a while.
@functools.lru_cache(maxsize=8)
def abstract_boxed_params(config: LanguageModelConfig, platform: str) -> Any:
    """Returns `abstract_params`, each boxed with its logical axis names."""
    model = language_model(config, platform)
    return jax.eval_shape(model.init, jax.random.key(0))
