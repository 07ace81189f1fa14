"""A trained model in one object, for verbs, notebooks and scripts."""

import dataclasses
import functools
from typing import Any

from jax.sharding import Mesh
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from research.data.tokenizers import Tokenizer
from research.inference.logits import logits, model_inputs
from research.inference.pooling import WholeTexts
from research.inference.text_reader import TextReader
from research.models.config import ModelConfig
from research.parallel.mesh import on_mesh
from research.recipes.loaded_generation import GenerationMethods


@dataclasses.dataclass(frozen=True)
class LoadedModel(GenerationMethods, WholeTexts):
    """A trained model, for notebooks and scripts.

    Attributes:
      config: what it is.
      params: its parameters.
      tokenizer: the one it was trained with.
      step: of the checkpoint.
      mesh: the devices that it is sharded over; None is one device.
      params_digest: of the parameters, as their checkpoint has it; None where they are of none.
    """

    config: ModelConfig
    params: Any
    tokenizer: Tokenizer
    step: int
    mesh: Mesh | None = None
    params_digest: bytes | None = None

    @functools.cached_property
    def _reader(self) -> TextReader:
        return TextReader(self.config, self.params, self.tokenizer, self.mesh)

    def logits(
        self,
        tokens: ArrayLike,
        segments: ArrayLike | None = None,
        *,
        encoder_tokens: ArrayLike | None = None,
        encoder_segments: ArrayLike | None = None,
        types: ArrayLike | None = None,
        prefix: ArrayLike | None = None,
    ) -> Float[Array, "B T V"]:
        """Returns float32 logits of whole sequences.

        Args:
          tokens: ids [B, T] below the vocabulary's size, as lists or an array.
          segments: [B, T], of packed rows, 0 for padding; positions start anew in each. None: a row
              is one sequence.
          encoder_tokens: ids [B, M] that an encoder-decoder's encoder reads.
          encoder_segments: [B, M], as `segments`, and of the same documents; packed rows need both.
          types: kind of segment of each token [B, T], for models with `embedding.num_types`; None
              is 0.
          prefix: 1 where a token belongs to its document's prefix [B, T], for `structure` prefix;
              None has no prefix.

        Raises:
          UserError: no rows of ids, a number out of range, rows too long, or what the model does
              not read, or misses.
        """
        arrays = (tokens, segments, encoder_tokens, encoder_segments)
        inputs = model_inputs(self.config, *arrays, types=types, prefix=prefix)
        with on_mesh(self.mesh):
            return logits(self.config, self.params, inputs)
