"""What the device is told of a sequence that gets a slot, and what of a model the pages go by."""

from collections.abc import Collection

import jax.numpy as jnp
import numpy as np

from research.core.random import key_words
from research.inference.id_masks import num_words
from research.inference.sampling import IdRules
from research.inference.sampling_config import SamplingConfig, SamplingParams
from research.inference.sequence import Sequence
from research.inference.slots import LogprobKind, Slots
from research.models.config import ModelConfig
from research.models.language_model import LanguageModelConfig


def id_rules(
    sequence: Sequence,
    num_prompt: int,
    sampling: SamplingConfig,
    end_ids: Collection[int],
    num_ids: int,
) -> IdRules:
    """Returns what holds for each id in a sequence, in one row.

    Args:
      sequence: whose.
      num_prompt: how many of its tokens are the prompt's.
      sampling: how its tokens are drawn.
      end_ids: of the tokenizer.
      num_ids: ids that may be drawn.
    """
    in_prompt = np.zeros((1, num_ids), bool)
    counts = np.zeros((1, num_ids), np.int32)
    # Prompts may have ids that are never drawn.
    prompt = [i for i in sequence.tokens[:num_prompt] if i < num_ids]
    in_prompt[0, prompt] = True
    np.add.at(counts[0], np.array(sequence.tokens[num_prompt:], np.int32), 1)
    bias = np.zeros((1, num_ids), np.float32)
    for i, value in sampling.logit_bias:
        bias[0, i] += value
    is_end = np.zeros((1, num_ids), bool)
    is_end[0, [i for i in end_ids if i < num_ids]] = True
    is_end[0, list(sampling.stop_ids)] = True
    words = num_words(num_ids)
    return IdRules(
        in_prompt=jnp.asarray(in_prompt),
        counts=jnp.asarray(counts),
        bias=jnp.asarray(bias),
        is_end=jnp.asarray(is_end),
        first_end=jnp.array([num_prompt + sampling.min_tokens], jnp.int32),
        allowed=jnp.asarray(np.full((1, words), 2**32 - 1, np.uint32)),
    )


def one_slot(
    sequence: Sequence,
    sampling: SamplingConfig,
    seed: int,
    memory: int,
    kind: LogprobKind,
    rules: IdRules,
    drafts: int,
    adapter: int = 0,
) -> Slots:
    """Returns what the device keeps of a sequence, in one row.

    Args:
      sequence: which.
      sampling: how its tokens are drawn.
      seed: that they are drawn with.
      memory: the row of what an encoder read for it.
      kind: of its log-probabilities.
      rules: of its ids.
      drafts: that a sequence may have.
      adapter: which of the model's adapters reads it, from 1; 0 for none.
    """
    plain = SamplingConfig()
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias")
    names = (*names, "min_tokens")
    edits = any(getattr(sampling, name) != getattr(plain, name) for name in names)
    # [1, words] -> [1, 1 + drafts, words]
    allowed = np.repeat(np.asarray(rules.allowed)[:, None], 1 + drafts, axis=1)
    return Slots(
        newest=jnp.array(sequence.tokens[-1:], jnp.int32),
        drafts=jnp.asarray(np.full((1, drafts), -1, np.int32)),
        keys=jnp.asarray(key_words([seed])),
        limit=jnp.array([sequence.limit], jnp.int32),
        memory=jnp.array([memory], jnp.int32),
        adapter=jnp.array([adapter], jnp.int32),
        sampling=SamplingParams.of([sampling]),
        edits=jnp.array([edits or sequence.needs_host]),
        rules=rules.replace(allowed=jnp.asarray(allowed)),
        kind=jnp.array([int(kind)], jnp.int32),
    )


def goes_by_length(config: LanguageModelConfig) -> bool:
    """Returns whether keys depend on the length that a text may have."""
    if not isinstance(config, ModelConfig):
        return False
    scalings = [config.position_of(layer).scaling for layer in config.layers()]
    return any(scaling is not None and scaling.by_length for scaling in scalings)


def windows_of(config: LanguageModelConfig, *, keeps_all: bool) -> tuple[int, ...]:
    """Returns how many tokens each token attends to, at most, in each kind of layers that keep the
    same tokens: 0, where some attend to all, then the largest window, where some have one.

    Args:
      config: of the model.
      keeps_all: whether there are layers beside the model's, which keep all tokens.
    """
    layers = config.layers() if isinstance(config, ModelConfig) else ()
    windows = [layer.window for layer in layers if layer.window is not None]
    # Windows [4, None, 8] -> (0, 8), [4, 8] -> (8,), [None] -> (0,)
    kinds = []
    if keeps_all or not windows or len(windows) < len(layers):
        kinds.append(0)
    if windows:
        kinds.append(max(windows))
    return tuple(kinds)
