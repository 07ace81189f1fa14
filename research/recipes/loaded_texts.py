"""What a loaded model says of whole texts, without drawing any."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from research.data.tokenizers import Tokenizer
from research.inference.pooling import MaskScore, TextScore, WholeTexts
from research.inference.prompts import Prompt
from research.models.config import ModelConfig
from research.recipes.generation_mesh import on_mesh


class WholeTextMethods:
    """The methods of `LoadedModel` that read whole texts.

    What is said of a text is, bit for bit, what is said of it alone. Each method takes texts, which
    the tokenizer frames as the model reads them, or `ids`, which are used unchanged. A text that is
    too long is refused, never cut.
    """

    config: ModelConfig
    params: Any
    tokenizer: Tokenizer
    mesh: Mesh | None

    @functools.cached_property
    def _whole_texts(self) -> WholeTexts:
        return WholeTexts(self.config, self.params, self.tokenizer)

    def embed(
        self,
        texts: Sequence[str] | None = None,
        *,
        ids: Sequence[Any] | None = None,
        pooling: str = "mean",
        normalize: bool = True,
        dimensions: int | None = None,
    ) -> Float[np.ndarray, "B D"]:
        """Returns an embedding of each text, from the last hidden states: those of the encoder,
        where there is one.

        Args:
          texts: as an encoder reads them, or as the prompts of a decoder.
          ids: rows of ids instead.
          pooling: `mean` of all tokens, or the `first` or the `last` token's state.
          normalize: whether embeddings have length 1.
          dimensions: the first ones alone are kept, in [1, D], before they are normalized; None
            keeps all. Of use where the model was trained for it (arXiv:2205.13147).

        Raises:
          UserError: texts that the model cannot read, or settings out of range; the first token of
            a decoder, which attends to no other.
        """
        with on_mesh(self.mesh):
            return self._whole_texts.embed(
                texts, ids=ids, pooling=pooling, normalize=normalize, dimensions=dimensions
            )

    def score(
        self,
        texts: Sequence[str] | None = None,
        *,
        ids: Sequence[Any] | None = None,
        prompts: Sequence[Prompt] | None = None,
        top: int = 0,
    ) -> list[TextScore]:
        """Returns the log-probabilities of each text's tokens.

        Args:
          texts: without prompts framed as a prompt, whose first token has no log-probability; after
            a prompt their ids alone.
          ids: rows of ids instead.
          prompts: what comes before each text, texts or rows of ids: the source that an encoder
            reads, or the prefix of a prefix decoder. None: nothing does.
          top: how many of the likeliest ids are named in the place of each token.

        Raises:
          UserError: texts that the model cannot read, a model that predicts no next token, or one
            with an encoder and no prompts.
        """
        with on_mesh(self.mesh):
            return self._whole_texts.score(texts, ids=ids, prompts=prompts, top=top)

    def classify(
        self, texts: Sequence[str] | None = None, *, ids: Sequence[Any] | None = None
    ) -> Float[np.ndarray, "B classes"]:
        """Returns the float32 logits of each text's class, of an encoder with `head.num_classes`.

        Raises:
          UserError: texts that the model cannot read, or a model without classes.
        """
        with on_mesh(self.mesh):
            return self._whole_texts.classify(texts, ids=ids)

    def score_pairs(
        self,
        pairs: Sequence[Sequence[str]] | None = None,
        *,
        ids: Sequence[Any] | None = None,
    ) -> Float[np.ndarray, "B classes"]:
        """Returns the float32 logits of the class of each pair of texts. Of BERT's two the first
        says that the second text follows.

        Args:
          pairs: read as [CLS] first [SEP] second [SEP], the second with type 1.
          ids: pairs of rows of ids instead.

        Raises:
          UserError: texts that the model cannot read, or a model without classes or types.
        """
        with on_mesh(self.mesh):
            return self._whole_texts.score_pairs(pairs, ids=ids)

    def fill_masks(
        self,
        texts: Sequence[str] | None = None,
        *,
        ids: Sequence[Any] | None = None,
        top: int = 5,
    ) -> list[list[MaskScore]]:
        """Returns the likeliest ids behind each mask of each text.

        Args:
          texts: in which the tokenizer's mask is spelt: `<mask>`, or `[MASK]`.
          ids: rows of ids instead.
          top: how many ids.

        Raises:
          UserError: texts that the model cannot read or that have no mask, or a model that is no
            encoder, or whose tokenizer has no mask.
        """
        with on_mesh(self.mesh):
            return self._whole_texts.fill_masks(texts, ids=ids, top=top)
