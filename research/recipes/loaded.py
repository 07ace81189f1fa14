"""A trained model in one object, for verbs, notebooks and scripts."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from research.core import config as configs
from research.core.errors import UserError
from research.data.tokenizers import Tokenizer
from research.inference.answers import Beam
from research.inference.beam_config import BeamConfig
from research.inference.beam_generate import beam_generate
from research.inference.generate import generate
from research.inference.logits import logits, model_inputs
from research.inference.requests import collect_prompts, decoding_config
from research.inference.sampling_config import SamplingConfig
from research.inference.text import Completion
from research.models.config import ModelConfig
from research.recipes.generation_mesh import on_mesh
from research.recipes.loaded_engine import EngineMethods
from research.recipes.loaded_texts import WholeTextMethods


@dataclasses.dataclass(frozen=True)
class LoadedModel(EngineMethods, WholeTextMethods):
    """A trained model, for notebooks and scripts.

    Attributes:
      config: what it is.
      params: its parameters.
      tokenizer: the one it was trained with.
      step: of the checkpoint.
      mesh: the devices that it is sharded over; None is one device.
    """

    config: ModelConfig
    params: Any
    tokenizer: Tokenizer
    step: int
    mesh: Mesh | None = None

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

    def generate(
        self,
        prompts: Sequence[str] | None = None,
        *,
        ids: Sequence[Any] | None = None,
        messages: Sequence[Any] | None = None,
        chat: Mapping[str, Any] | None = None,
        sampling: Sequence[SamplingConfig] | None = None,
        seeds: Sequence[Any] | None = None,
        **fields: Any,
    ) -> list[Completion]:
        """Continues prompts: by sampling, or by beam search where `num_beams` is above 1.

        Exactly one of `prompts`, `ids` and `messages` is given. A text ends at any of the
        tokenizer's `end_ids`.

        Args:
          prompts: texts; the tokenizer adds its own ids before and after each.
          ids: rows of ids, which are used unchanged.
          messages: a conversation, dicts of `role` and `content`, or a list of conversations, for
            the model's chat template; what is generated is the assistant's answer. Special tokens
            in messages stay text.
          chat: further arguments of `Tokenizer.encode_chat`: `tools`, `template`, and the
              template's own variables.
          sampling: settings for each prompt, instead of `fields`; all run in one batch.
          seeds: of sampling, one per prompt.
          fields: those of `SamplingConfig`, or of `BeamConfig`.

        Raises:
          UserError: a field that is not known or out of range, or prompts or messages that do not
              fit.
        """
        if sampling is not None and fields:
            names = ", ".join(sorted(fields))
            raise UserError("sampling", constraint=f": it says all, so {names} must be left out.")

        # Sampling, one for all or one per prompt, or beam search.
        how = decoding_config(fields) if sampling is None else sampling
        read = collect_prompts(self.tokenizer, prompts, ids, messages, chat)
        searches = isinstance(how, BeamConfig)
        if searches and seeds is not None:
            why = f"num_beams = {how.num_beams} searches and draws nothing"
            raise UserError("seeds", constraint=f": {why}; leave them out.")

        model = (self.config, self.params, self.tokenizer)
        if not searches:
            return generate(*model, read, how, seeds, mesh=self.mesh)
        # The best hypothesis is the completion.
        return [best for best, *_ in beam_generate(*model, read, how, mesh=self.mesh)]

    def beams(
        self,
        prompts: Sequence[str] | None = None,
        *,
        ids: Sequence[Any] | None = None,
        messages: Sequence[Any] | None = None,
        chat: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> list[list[Beam]]:
        """Returns the `num_return` best continuations of each prompt; `fields` are those of
        `BeamConfig`.

        Args, Raises: as `generate`.
        """
        read = collect_prompts(self.tokenizer, prompts, ids, messages, chat)
        beams = configs.bind(BeamConfig, fields)
        model = (self.config, self.params, self.tokenizer)
        return beam_generate(*model, read, beams, mesh=self.mesh)
