"""The transformer as a `LanguageModel`: pure functions of a config and parameters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.data.batch import Batch, ModelInputs
from research.models.cache import Cache, empty_cache
from research.models.config import ModelConfig
from research.models.flops import train_flops_per_token
from research.models.initialization import init_params
from research.models.layer_loops import LayerLoop
from research.models.paged_cache import PageTable
from research.models.stack import resolve_layer_loop
from research.models.transformer import LogitTerms, Output, Transformer


@dataclasses.dataclass(frozen=True)
class TransformerModel:
    """A transformer; `LanguageModel` says what its methods do.

    Attributes:
      config: of the model; `layer_loop = "auto"` counts as `unroll` where parameters are made.
      loop: how layers are run; None follows the form of their parameters.
    """

    config: ModelConfig
    loop: LayerLoop | None = None

    @classmethod
    def for_platform(cls, config: ModelConfig, platform: str | None) -> "TransformerModel":
        """Returns the model that suits `cpu`, `gpu` or `tpu`."""
        if platform is not None:
            config = resolve_layer_loop(config, platform)
        return cls(config)

    def init(self, key: jax.Array) -> Any:
        """Returns boxed parameters, those of layers stacked where layers are scanned."""
        return init_params(self.config, key)

    def hidden(
        self,
        params: Any,
        inputs: ModelInputs | Batch,
        *,
        cache: Cache | None = None,
        key: jax.Array | None = None,
    ) -> Output:
        """Returns hidden states and what comes with them."""
        deterministic = key is None
        rngs = {} if deterministic else {"dropout": key}
        model = Transformer(self.config, loop=self.loop)
        return model.apply(
            {"params": params}, inputs, cache, deterministic=deterministic, rngs=rngs
        )

    def encode(self, params: Any, inputs: ModelInputs | Batch) -> Float[Array, "B M D"]:
        """Returns the hidden states of an encoder-decoder's encoder."""
        model = Transformer(self.config, loop=self.loop)
        hidden, _ = model.apply({"params": params}, inputs, method=Transformer.encode)
        return hidden

    def class_logits(self, params: Any, hidden: Float[Array, "B T D"]) -> Float[Array, "B classes"]:
        """Returns the float32 logits of each row's class, of a model with `head.num_classes`."""
        model = Transformer(self.config)
        _, logits = model.apply({"params": params}, hidden, method=Transformer.pooled)
        return logits.astype(jnp.float32)

    def mtp_step(
        self,
        params: Any,
        hidden: Float[Array, "B T D"],
        following: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: Cache,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """As `Transformer.mtp_step`."""
        model = Transformer(self.config)
        inputs = (hidden, following, positions, cache)
        return model.apply({"params": params}, *inputs, method=Transformer.mtp_step)

    def projection(self, params: Any, hidden: Float[Array, "*batch D"]) -> LogitTerms:
        """Returns the terms of the logits: their product is not computed yet."""
        return Transformer(self.config).apply(
            {"params": params}, hidden, method=Transformer.projection
        )

    def empty_cache(
        self,
        params: Any,
        batch: int,
        slots: int,
        memory_segments: Int[Array, "B M"] | None = None,
        page_table: PageTable | None = None,
        cache_dtype: str | None = None,
    ) -> Cache:
        """Returns a cache of zeros, that of stacked layers stacked as they are."""
        stacked = "layers" in params
        return empty_cache(
            self.config,
            batch,
            slots,
            stacked,
            memory_segments,
            page_table=page_table,
            cache_dtype=cache_dtype,
        )

    def flops_per_token(self, sequence_length: int, encoder_length: int = 0) -> float:
        """Returns the FLOPs of one training step, per token of the decoder."""
        return train_flops_per_token(self.config, sequence_length, encoder_length)
