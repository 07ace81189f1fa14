"""Prompts as a model reads them: text to ids, ids to padded rows."""

from collections.abc import Callable, Sequence

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from research.core.errors import UserError
from research.data.tokenizers import Tokenizer
from research.models.language_model import LanguageModelConfig

# Prompts and caches are padded to a multiple of this, so that few shapes are compiled.
BUCKET = 64

# A prompt: text, or ids that are used unchanged.
Prompt = str | Sequence[int]


@flax.struct.dataclass
class Prompts:
    """Prompts in rows, padded on the right.

    Attributes:
      tokens: what the decoder reads: the prompts, or `decoder_start_id` where an encoder reads
        them.
      lengths: tokens of each, at least 1.
      encoder_tokens: what the encoder reads, where there is one.
      encoder_lengths: tokens of each of these.
    """

    tokens: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    encoder_tokens: Int[Array, "B M"] | None = None
    encoder_lengths: Int[Array, "B"] | None = None


def encode_ids(
    config: LanguageModelConfig, tokenizer: Tokenizer, prompts: Sequence[Prompt]
) -> list[list[int]]:
    """Returns the ids of each prompt, which an encoder reads where there is one.

    Raises:
      UserError: no prompts, one that does not fit the model's ids, or a model that has no decoder.
    """
    if config.structure == "encoder":
        raise UserError(
            "model.structure",
            "encoder",
            "makes no text: it has no decoder. It gives logits and states.",
        )
    if not prompts:
        raise UserError("prompts", constraint=": at least one prompt is needed.")
    encode_text = tokenizer.encode_prompt
    if config.structure == "encoder_decoder":
        encode_text = tokenizer.encode_source
    return [_ids(config, tokenizer, prompt, encode_text) for prompt in prompts]


def encode(
    config: LanguageModelConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    max_tokens: Sequence[int],
) -> tuple[Prompts, int]:
    """Returns the prompts in rows, and the slots that a cache needs for each of them and its
    `max_tokens` new tokens.

    Raises:
      UserError: as of `encode_ids`, or a prompt that does not fit the model's positions.
    """
    encoded = encode_ids(config, tokenizer, prompts)
    if config.structure == "encoder_decoder":
        # The encoder reads the prompts; the decoder of each begins with one id.
        check_room(encoded, [0] * len(encoded), config)
        starts = [[config.decoder_start_id]] * len(prompts)
        needed = check_room(starts, max_tokens, config)
        sources = _pad(encoded, config.max_length)
        rows = Prompts(jnp.asarray(starts), jnp.ones(len(prompts), jnp.int32), *sources)
    else:
        needed = check_room(encoded, max_tokens, config)
        rows = Prompts(*_pad(encoded, config.max_length))
    return rows, min(bucket(needed), config.max_length)


def check_room(
    encoded: Sequence[Sequence[int]], max_tokens: Sequence[int], config: LanguageModelConfig
) -> int:
    """Returns the slots of the longest text; raises UserError where a prompt and its new tokens do
    not fit.
    """
    room = config.max_length
    lengths = [len(ids) for ids in encoded]
    # (prompt, new) tokens, the longest prompt first: the error names that one.
    pairs = list(zip(lengths, max_tokens, strict=True))
    pairs.sort(reverse=True)
    for length, new in pairs:
        if length > room or (new and length == room):
            fault = "leaves no room within" if new else "is longer than"
            raise UserError(
                "prompts",
                constraint=f": a prompt of {length} tokens {fault} the model's max_length = "
                f"{room}. Use a shorter one.",
            )
        if length + new > room:
            raise UserError(
                "max_tokens",
                new,
                f"after a prompt of {length} tokens is more than the model's max_length = {room}. "
                f"Use at most {room - length}.",
            )
    return max(length + new for length, new in pairs)


def bucket(length: int) -> int:
    """Returns `length` rounded up to whole buckets."""
    return -(-length // BUCKET) * BUCKET


def _pad(
    encoded: Sequence[Sequence[int]], max_length: int
) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """Returns ids as rows of one bucketed width, and their lengths."""
    # [[5, 6], [7]] -> [[5, 6, 0, …], [7, 0, 0, …]], lengths [2, 1]
    lengths = [len(ids) for ids in encoded]
    width = bucket(max(lengths))
    width = min(width, max_length)
    padded = np.zeros((len(encoded), width), np.int32)
    for row, ids in enumerate(encoded):
        padded[row, : len(ids)] = ids
    return jnp.asarray(padded), jnp.asarray(lengths, jnp.int32)


def _ids(
    config: LanguageModelConfig,
    tokenizer: Tokenizer,
    prompt: Prompt,
    encode_text: Callable[[str], list[int]],
) -> list[int]:
    """Returns the ids of a prompt; raises UserError where there are none, or one that the model
    does not have.
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
            raise UserError(argument, constraint=_out_of_range(config, tokenizer, prompt, i))
    return ids


def _out_of_range(config: LanguageModelConfig, tokenizer: Tokenizer, prompt: Prompt, i: int) -> str:
    """Returns the message about an id that the model's embedding has no row for."""
    # A text whose tokenizer has more ids than the model, or ids that are given.
    bound = f"the model's ids lie in [0, {config.vocab_size})"
    is_text = isinstance(prompt, str)
    if not is_text or not 0 <= i < tokenizer.vocab_size:
        return f": id {i} is out of range: {bound}."

    names = {control: name for name, control in tokenizer.control_tokens.items()}
    text = names[i] if i in names else tokenizer.decode([i])
    return f": {text!r} is the tokenizer's id {i}, and {bound}."
