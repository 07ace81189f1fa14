"""Prompts as a model reads them, and the prefill: all of them read at once, before the first new
token.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from research.core.errors import UserError
from research.data.tokenizers import Tokenizer
from research.models.cache import Cache
from research.models.language_model import LanguageModelConfig, language_model
from research.models.paged_cache import PageTable, contiguous_table
from research.models.transformer import compute_logits

# Prompts and caches are padded to a multiple of this, so that few shapes are compiled.
BUCKET = 64
# Forms of the KV cache: rows of slots, or pages of one pool.
CACHES = ("dense", "paged")


@flax.struct.dataclass
class Prompts:
    """Prompts in rows, padded on the right.

    Attributes:
      tokens: what the decoder reads: the prompts, or the start id where an encoder reads them.
      lengths: tokens of each, at least 1.
      encoder_tokens: what the encoder reads, where there is one.
      encoder_lengths: tokens of each of these.
    """

    tokens: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    encoder_tokens: Int[Array, "B M"] | None = None
    encoder_lengths: Int[Array, "B"] | None = None

    def rows(self) -> list[list[int]]:
        """Returns the ids of each row of the decoder, without padding."""
        rows = zip(np.asarray(self.tokens), np.asarray(self.lengths), strict=True)
        return [row[:length].tolist() for row, length in rows]


# A prompt: text, or the ids that are to be read as they stand.
Prompt = str | Sequence[int]


def encode(
    config: LanguageModelConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    max_tokens: Sequence[int],
) -> tuple[Prompts, int]:
    """Returns the prompts in rows, and the slots that a cache needs for each of them and its
    `max_tokens` new tokens.

    Raises:
      UserError: no prompts, one that does not fit the model's positions or ids, or a model that
          makes no text.
    """
    if config.structure == "encoder":
        raise UserError(
            "model.structure",
            "encoder",
            "makes no text: it has no decoder. It gives logits and states.",
        )
    if not prompts:
        raise UserError("prompts", constraint=": at least one prompt is needed.")
    if config.structure != "encoder_decoder":
        encoded = [_ids(config, tokenizer, prompt, tokenizer.encode_prompt) for prompt in prompts]
        needed = check_room(encoded, max_tokens, config)
        read = Prompts(*_pad(encoded, config.max_length))
    else:
        sources = [_ids(config, tokenizer, prompt, tokenizer.encode_source) for prompt in prompts]
        check_room(sources, [0] * len(sources), config)
        encoded = [[config.decoder_start_id]] * len(prompts)
        needed = check_room(encoded, max_tokens, config)
        read = Prompts(
            *(jnp.asarray(array) for array in (encoded, [1] * len(prompts))),
            *_pad(sources, config.max_length),
        )
    return read, min(bucket(needed), config.max_length)


def check_room(
    encoded: Sequence[Sequence[int]], max_tokens: Sequence[int], config: LanguageModelConfig
) -> int:
    """Returns the slots of the longest text; raises UserError where a prompt and its new tokens do
    not fit.
    """
    room = config.max_length
    lengths = [len(ids) for ids in encoded]
    # The longest prompt is named first.
    for length, new in sorted(zip(lengths, max_tokens, strict=True), reverse=True):
        if length > room or (new and length == room):
            leaves = "leaves no room within" if new else "is longer than"
            raise UserError(
                "prompts",
                constraint=f": a prompt of {length} tokens {leaves} the model's max_length = "
                f"{room}. Use a "
                "shorter one.",
            )
        if length + new > room:
            raise UserError(
                "max_tokens",
                new,
                f"after a prompt of {length} tokens is more than the model's max_length = {room}. "
                "Use at most "
                f"{room - length}.",
            )
    return max(length + new for length, new in zip(lengths, max_tokens, strict=True))


def check_cache(cache: str) -> None:
    """Raises UserError where there is no such form of the cache."""
    if cache not in CACHES:
        raise UserError("cache", cache, f"is not one of {', '.join(CACHES)}.")


def table_for(
    cache: str, prompts: Prompts, new_tokens: Sequence[int], slots: int
) -> PageTable | None:
    """Returns the pages of a batch of prompts, each with room for its new tokens; None for the
    dense cache.

    Raises:
      UserError: there is no such form of the cache.
    """
    check_cache(cache)
    if cache == "dense":
        return None
    lengths = np.asarray(prompts.lengths).tolist()
    return contiguous_table(
        [old + new for old, new in zip(lengths, new_tokens, strict=True)], slots
    )


def bucket(length: int) -> int:
    """Returns `length` rounded up to whole buckets."""
    return -(-length // BUCKET) * BUCKET


def _pad(
    encoded: Sequence[Sequence[int]], max_length: int
) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    lengths = [len(ids) for ids in encoded]
    padded = np.zeros((len(encoded), min(bucket(max(lengths)), max_length)), np.int32)
    for row, ids in enumerate(encoded):
        padded[row, : len(ids)] = ids
    return jnp.asarray(padded), jnp.asarray(lengths, jnp.int32)


def _ids(
    config: LanguageModelConfig,
    tokenizer: Tokenizer,
    prompt: Prompt,
    encode_text: Callable[[str], list[int]],
) -> list[int]:
    """Returns the ids of a prompt; raises UserError where there are none, or one that the model has
    not.
    """
    if isinstance(prompt, str):
        ids = encode_text(prompt)
        if not ids:
            raise UserError(
                "prompts",
                "",
                "is empty, and the tokenizer has no begin or end of text to stand for it.",
            )
    else:
        ids = list(prompt)
    for i in ids:
        if not 0 <= i < config.vocab_size:
            argument = "prompts" if isinstance(prompt, str) else "ids"
            raise UserError(argument, constraint=_outside(config, tokenizer, prompt, i))
    return ids


def _outside(config: LanguageModelConfig, tokenizer: Tokenizer, prompt: Prompt, i: int) -> str:
    """Returns what is said of an id that the model's embedding has no row for."""
    bound = f"the model's ids lie in [0, {config.vocab_size})"
    if isinstance(prompt, str) and 0 <= i < tokenizer.vocab_size:
        names = {control: name for name, control in tokenizer.control_tokens.items()}
        spelt = names[i] if i in names else tokenizer.decode([i])
        return f": {spelt!r} is the tokenizer's id {i}, and {bound}."
    return f": id {i} is out of range: {bound}."


def next_logits(
    config: LanguageModelConfig,
    params: Any,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: Cache,
    which: Int[Array, "B"],
    **inputs: Int[Array, "B _"],
) -> tuple[Float[Array, "B V"], Cache]:
    """Returns the logits of one place in each sequence, and the cache with the tokens in it.

    Args:
      config: the model.
      params: its parameters.
      tokens: consecutive ones of each sequence.
      positions: of the tokens.
      cache: of the tokens before.
      which: the place, in [0, T).
      **inputs: what else the model reads the first time.
    """

    model = language_model(config)
    output = model.hidden(params, {"tokens": tokens, "positions": positions, **inputs}, cache=cache)
    hidden = jnp.take_along_axis(output.hidden, which[:, None, None], axis=1)
    return compute_logits(model.projection(params, hidden))[:, 0], output.cache


@functools.partial(jax.jit, static_argnames=("config", "slots"))
def prefill(
    params: Any,
    prompts: Prompts,
    *,
    config: LanguageModelConfig,
    slots: int,
    page_table: PageTable | None = None,
) -> tuple[Float[Array, "B V"], Cache]:
    """Returns the logits after each prompt, and the cache. What stands there for padding is never
    seen.

    Args:
      params: of the model.
      prompts: from `encode`.
      config: the model.
      slots: tokens that the cache can hold.
      page_table: makes it a paged cache.
    """
    real, positions = _places(prompts.tokens, prompts.lengths)
    inputs, segments = {}, None
    if config.structure == "prefix":  # all of a prompt is seen from all of it
        inputs = {"prefix": real.astype(jnp.int32)}
    if prompts.encoder_tokens is not None:
        known, places = _places(prompts.encoder_tokens, prompts.encoder_lengths)
        segments = known.astype(jnp.int32)
        inputs = {
            "encoder_tokens": prompts.encoder_tokens,
            "encoder_positions": places,
            "encoder_segments": segments,
        }
    model = language_model(config)
    cache = model.empty_cache(params, len(prompts.tokens), slots, segments, page_table=page_table)
    return next_logits(
        config, params, prompts.tokens, positions, cache, prompts.lengths - 1, **inputs
    )


def _places(
    tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
) -> tuple[Bool[Array, "B T"], Int[Array, "B T"]]:
    """Returns which tokens are no padding, and their positions.

    These count on to a prompt's end and not through its padding: rotary rules that go by length
    read it there.
    """
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    real = index < lengths[:, None]
    return real, jnp.where(real, index, 0)
