"""Whole texts through a model, in batches of fixed shapes.

A text is padded to a width that its own length decides, and its batch has as many rows as that
width decides. So its program is the same, whoever is beside it. What is left is which row of the
batch it takes: matrix products may be cut among threads so that rows of one batch are not computed
alike, so a batch of several rows is tried before it is used, and halved until they are.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from research.inference.prefill import real_positions
from research.models.config import ModelConfig
from research.models.language_model import LanguageModel
from research.models.transformer import compute_logits
from research.models.transformer_model import TransformerModel
from research.parallel.mesh import on_mesh
from research.parallel.target import platform

# The smallest width; the others are its doubles.
SHORTEST = 32
# Tokens of a batch, at most, but for a text that is longer. On CPU more are no faster.
CPU_TOKENS = 256
ACCELERATOR_TOKENS = 8192
# Tokens whose logits exist at a time.
LOGIT_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Text:
    """A text as a model reads it.

    Attributes:
      tokens: ids of the decoder, or of the only stack.
      types: of each token; empty where the model has none.
      prefix: how many of them are a prefix decoder's prefix.
      source: ids that an encoder reads; empty without one.
      chosen: tokens whose states are pooled.
      targets: an id for each token, whose log-probability after it is asked for; empty where none
        is.
    """

    tokens: Sequence[int]
    types: Sequence[int] = ()
    prefix: int = 0
    source: Sequence[int] = ()
    chosen: range = range(0)
    targets: Sequence[int] = ()

    @property
    def width(self) -> int:
        """The width of its row: a power of two."""
        needed = max(len(self.tokens), len(self.source))
        width = SHORTEST
        while width < needed:
            width *= 2
        return width


@flax.struct.dataclass
class TextRows:
    """Texts in rows of one width.

    Attributes:
      tokens: padded on the right.
      lengths: tokens of each row; 0 where the row is padding.
      types: of each token, 0 where nothing else is said.
      prefix: tokens of each row's prefix.
      source: what an encoder reads, padded.
      source_lengths: tokens of each row of it.
      chosen: tokens whose states are pooled.
      targets: ids whose log-probabilities are asked for.
    """

    tokens: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    types: Int[Array, "B T"]
    prefix: Int[Array, "B"]
    source: Int[Array, "B T"]
    source_lengths: Int[Array, "B"]
    chosen: Bool[Array, "B T"]
    targets: Int[Array, "B T"]

    @classmethod
    def of(cls, texts: Sequence[Text], rows: int, width: int) -> "TextRows":
        """Returns texts in a batch of a shape."""
        numbers = {
            name: np.zeros((rows, width), np.int32)
            for name in ("tokens", "types", "source", "targets", "chosen")
        }
        counts = {
            name: np.zeros(rows, np.int32) for name in ("lengths", "prefix", "source_lengths")
        }
        for row, text in enumerate(texts):
            for name in ("tokens", "types", "source", "targets"):
                values = getattr(text, name)
                numbers[name][row, : len(values)] = values
            numbers["chosen"][row, text.chosen.start : text.chosen.stop] = 1
            counts["lengths"][row] = len(text.tokens)
            counts["prefix"][row] = text.prefix
            counts["source_lengths"][row] = len(text.source)
        chosen = numbers.pop("chosen") != 0
        arrays = {name: jnp.asarray(array) for name, array in (numbers | counts).items()}
        return cls(**arrays, chosen=jnp.asarray(chosen))


# What is read of texts: a function of the config, the parameters and the rows, whose results have
# one entry per row.
Reading = Callable[[ModelConfig, Any, TextRows], Any]


def _hidden(
    config: ModelConfig, model: LanguageModel, params: Any, rows: TextRows
) -> Float[Array, "B T D"]:
    """Returns the hidden states of whole texts; nothing attends to padding."""
    is_real, positions = real_positions(rows.tokens, rows.lengths)
    # Rules of RoPE that go by length take the text's; padding has any.
    lengths = jnp.broadcast_to(jnp.maximum(rows.lengths, 1)[:, None], positions.shape)
    inputs = {
        "tokens": rows.tokens,
        "positions": positions,
        "segments": is_real.astype(jnp.int32),
        "lengths": lengths,
    }
    if config.embedding.num_types:
        inputs["types"] = rows.types
    if config.structure == "prefix":
        # Lengths [2] of width 4 -> [[1, 1, 0, 0]]
        index = jnp.arange(rows.tokens.shape[1], dtype=jnp.int32)[None]
        inputs["prefix"] = (index < rows.prefix[:, None]).astype(jnp.int32)
    if config.structure == "encoder_decoder":
        inputs |= _source_inputs(rows)
    return model.hidden(params, inputs).hidden


def _source_inputs(rows: TextRows) -> dict[str, Int[Array, "B T"]]:
    is_real, positions = real_positions(rows.source, rows.source_lengths)
    return {
        "encoder_tokens": rows.source,
        "encoder_positions": positions,
        "encoder_segments": is_real.astype(jnp.int32),
    }


def pooled_states(config: ModelConfig, params: Any, rows: TextRows) -> Float[Array, "B D"]:
    """Returns the mean of the last hidden states of each row's chosen tokens, in float32: an
    encoder's where there is one.
    """
    model = TransformerModel.for_platform(config, None)
    if config.structure == "encoder_decoder":
        hidden = model.encode(params, _source_inputs(rows))
    else:
        hidden = _hidden(config, model, params, rows)

    # What padding computes is not added, whatever it is.
    chosen = rows.chosen[:, :, None]
    states = jnp.where(chosen, hidden.astype(jnp.float32), 0.0)
    count = jnp.maximum(rows.chosen.sum(axis=1), 1)
    return states.sum(axis=1) / count[:, None].astype(jnp.float32)


def class_logits(config: ModelConfig, params: Any, rows: TextRows) -> Float[Array, "B classes"]:
    """Returns the float32 logits of each row's class."""
    model = TransformerModel.for_platform(config, None)
    return model.class_logits(params, _hidden(config, model, params, rows))


@flax.struct.dataclass
class TokenScores:
    """Log-probabilities at each token: a float32 log-softmax over all V of the model's logits;
    arrays of JAX, or of NumPy on the host.

    Attributes:
      logprob: of the token's target.
      top_ids: the likeliest ids, best first.
      top_logprobs: theirs.
    """

    logprob: Float[Any, "*batch"]
    top_ids: Int[Any, "*batch top"]
    top_logprobs: Float[Any, "*batch top"]


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Reads `TokenScores` of each token.

    Attributes:
      top: how many of the likeliest ids are named.
      num_ids: only ids below it are named; all count in the softmax.
    """

    top: int
    num_ids: int

    def __call__(self, config: ModelConfig, params: Any, rows: TextRows) -> TokenScores:
        model = TransformerModel.for_platform(config, None)
        hidden = _hidden(config, model, params, rows)

        # [B, T, D] -> [pieces, 1, tokens, D]: float32 logits of a piece alone exist at a time.
        batch, width, _ = hidden.shape
        piece = min(LOGIT_ROWS, batch * width)
        states = hidden.reshape(-1, 1, piece, hidden.shape[-1])
        targets = rows.targets.reshape(-1, 1, piece)

        def scores(operands: tuple[Array, Array]) -> TokenScores:
            states, targets = operands
            logits = compute_logits(model.projection(params, states))
            # Computed alone, so that its bits do not depend on how many ids are named.
            logprobs = jax.lax.optimization_barrier(jax.nn.log_softmax(logits, axis=-1))
            logprob = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
            top_logprobs, top_ids = jax.lax.top_k(logprobs[..., : self.num_ids], self.top)
            return TokenScores(logprob, top_ids, top_logprobs)

        found = jax.lax.map(scores, (states, targets))
        return jax.tree.map(lambda leaf: leaf.reshape(batch, width, *leaf.shape[3:]), found)


@functools.partial(jax.jit, static_argnames=("config", "reading"))
def read(params: Any, rows: TextRows, *, config: ModelConfig, reading: Reading) -> Any:
    """Returns what a reading finds in a batch."""
    return reading(config, params, rows)


class TextBatches:
    """Runs readings of a model over texts.

    Args:
      config: of the model.
      params: its parameters.
      mesh: that the parameters are sharded over; None is one device.
      tokens: of a batch, at most, but for longer texts; None suits the platform.
    """

    def __init__(
        self, config: ModelConfig, params: Any, mesh: Mesh | None = None, tokens: int | None = None
    ):
        if tokens is None:
            tokens = CPU_TOKENS if platform() == "cpu" else ACCELERATOR_TOKENS
        # Experts are computed in groups of the tokens that chose them, neighbours' among them.
        self._tokens = tokens if config.experts is None else 0
        self._config = config
        self._params = params
        self._mesh = mesh
        # Rows of a batch, by its reading and width.
        self._rows: dict[tuple[Reading, int], int] = {}

    def run(self, reading: Reading, texts: Sequence[Text]) -> list[Any]:
        """Returns what is read of each text, as NumPy arrays, in their order."""
        by_width: dict[int, list[int]] = {}
        for index, text in enumerate(texts):
            by_width.setdefault(text.width, []).append(index)

        found: dict[int, Any] = {}
        for width, indices in by_width.items():
            rows = self.rows_of(reading, width)
            for start in range(0, len(indices), rows):
                part = indices[start : start + rows]
                results = self._read(reading, [texts[index] for index in part], rows, width)
                found |= zip(part, results, strict=False)
        return [found[index] for index in range(len(texts))]

    def rows_of(self, reading: Reading, width: int) -> int:
        """Returns the rows of a batch: the most, within its tokens, that are computed alike."""
        key = (reading, width)
        if key not in self._rows:
            rows = max(self._tokens // width, 1)
            while rows > 1 and not self._computes_rows_alike(reading, rows, width):
                rows //= 2
            self._rows[key] = rows
        return self._rows[key]

    def _computes_rows_alike(self, reading: Reading, rows: int, width: int) -> bool:
        """Tries whether a text has the same bits in each row, beside itself and beside others."""
        text = _sample(self._config, width, 7919)
        other = _sample(self._config, width // 2, 104_729)
        even = [text, other] * (rows // 2)
        # The last row is padding.
        odd = [other, text] * (rows // 2 - 1) + [other]

        results = []
        for texts in ([text] * rows, even, odd):
            pairs = zip(texts, self._read(reading, texts, rows, width), strict=False)
            results += [result for each, result in pairs if each is text]
        bits = {tuple(leaf.tobytes() for leaf in jax.tree.leaves(result)) for result in results}
        return len(bits) == 1

    def _read(self, reading: Reading, texts: Sequence[Text], rows: int, width: int) -> list[Any]:
        """Returns what is read of each row of a batch, padding among them."""
        batch = TextRows.of(texts, rows, width)
        with on_mesh(self._mesh):
            results = read(self._params, batch, config=self._config, reading=reading)
        results = jax.tree.map(np.asarray, results)
        return [jax.tree.map(lambda leaf, row=row: leaf[row], results) for row in range(rows)]


def _sample(config: ModelConfig, length: int, step: int) -> Text:
    """Returns a text that says nothing, for a trial."""
    length = min(length, config.max_length)
    ids = [(1 + step * index) % config.vocab_size for index in range(length)]
    return Text(ids, source=ids, chosen=range(length), targets=ids)
