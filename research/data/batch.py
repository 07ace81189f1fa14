"""What a batch holds: every array's name, shape and meaning, written once.

All arrays have one entry per token, so a value of a sequence (an advantage, say) is repeated over
its tokens, and a sum over a sequence is a segment sum inside its row. NumPy arrays on the host and
JAX arrays on the devices have the same names.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NotRequired, Required, TypedDict, get_type_hints

from jaxtyping import Float, Int


class ModelInputs(TypedDict):
    """The arrays of a batch that a model reads: B rows of T tokens, and of M tokens for an encoder.

    Attributes:
      tokens: ids below the vocabulary's size.
      positions: of each token in its own sequence, from 0.
      segments: which sequence of its row a token belongs to, from 1; 0 is padding. Tokens of
        different segments never attend to each other. A model needs none where every row is one
        sequence; a batch always has them.
      lengths: of each token's own sequence, for RoPE rules that depend on it; else the positions
        say it, which do not tell how long an answer becomes.
      types: kind of segment of each token (BERT's sentence A and B), where a model has such
          embeddings.
      prefix: 1 where a token belongs to its sequence's prefix, which has bidirectional attention;
          else 0.
      encoder_tokens: what the encoder of an encoder-decoder reads.
      encoder_positions: as `positions`.
      encoder_segments: as `segments`; a document has the same number in both, and a token
        attends to the encoder's tokens of its own segment.
    """

    tokens: Int[Any, "B T"]
    positions: Int[Any, "B T"]
    segments: NotRequired[Int[Any, "B T"]]
    lengths: NotRequired[Int[Any, "B T"]]
    types: NotRequired[Int[Any, "B T"]]
    prefix: NotRequired[Int[Any, "B T"]]
    encoder_tokens: NotRequired[Int[Any, "B M"]]
    encoder_positions: NotRequired[Int[Any, "B M"]]
    encoder_segments: NotRequired[Int[Any, "B M"]]


class Batch(ModelInputs):
    """A training batch: what the model reads, what it should predict, and what preference and
    reinforcement learning need for each token.

    Attributes:
      targets: the id that each position should predict.
      weights: of each target in the loss; 0: no loss.
      pair: which answer of a preference pair a token belongs to: for pair p of the batch, from 0,
        the chosen one is 2p + 1 and the rejected one 2p + 2; 0: none.
      advantages: of the action that chose each target.
      old_logprobs: log-probability of each target under the policy that drew it, in nats.
      reference_logprobs: log-probability of each target under the reference policy, in nats.
      values: the critic's estimate at each position when the target was drawn.
      returns: the critic's target at each position.
    """

    segments: Required[Int[Any, "B T"]]
    targets: Int[Any, "B T"]
    weights: Float[Any, "B T"]
    pair: NotRequired[Int[Any, "B T"]]
    advantages: NotRequired[Float[Any, "B T"]]
    old_logprobs: NotRequired[Float[Any, "B T"]]
    reference_logprobs: NotRequired[Float[Any, "B T"]]
    values: NotRequired[Float[Any, "B T"]]
    returns: NotRequired[Float[Any, "B T"]]


# name -> the annotated shape and type
_FIELDS = get_type_hints(Batch)
_MODEL_FIELDS = get_type_hints(ModelInputs)
REQUIRED = tuple(name for name in _FIELDS if name in Batch.__required_keys__)
ENCODER = tuple(name for name in _MODEL_FIELDS if name.startswith("encoder_"))


def model_inputs(batch: Mapping[str, Any]) -> ModelInputs:
    """Returns the arrays of a batch that a model reads."""
    return {name: batch[name] for name in _MODEL_FIELDS if name in batch}


def shapes(
    names: Iterable[str], batch_size: int, sequence_length: int, encoder_length: int = 0
) -> dict[str, tuple[tuple[int, int], str]]:
    """Returns (shape, dtype) of the named arrays of a batch.

    Args:
      names: of arrays of `Batch`.
      batch_size: B.
      sequence_length: T.
      encoder_length: M.
    """
    result = {}
    for name in names:
        # Shapes "B T" and "B M".
        width = encoder_length if name in ENCODER else sequence_length
        dtype = "float32" if _FIELDS[name].dtype is Float else "int32"
        result[name] = ((batch_size, width), dtype)
    return result
