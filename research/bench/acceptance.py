"""How often a guess is kept: by this engine, and by rejection sampling.

A token is drawn from p by the model, and guessed from q. The engine draws both with the same noise
g, argmax (log p + g) and argmax (log q + g), and keeps the guess where they are the same token:

    P(same) = Σ_i 1 / Σ_j max(p_j / p_i, q_j / q_i)

Rejection sampling keeps a guess with probability Σ_i min(p_i, q_i), which is the most that any way
can. What it draws then depends on the guess, and so on who guesses.

Source: Leviathan et al. 2023, arXiv:2211.17192, theorem 3.5; Daliri et al. 2024, arXiv:2408.07978,
    for the same noise.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from research.inference.speculation.lookup import Lookup
from research.models.config import ModelConfig
from research.models.language_model import language_model
from research.models.transformer import compute_logits

# Instead of a probability of 0, in logarithms and below a line.
TINY = 1e-300
Distributions = Float[np.ndarray, "rows V"]


class Acceptance(NamedTuple):
    """How often guesses are kept in the mean.

    Attributes:
      same_noise: by this engine.
      rejection: by rejection sampling.
      guesses: of how many.
    """

    same_noise: float
    rejection: float
    guesses: int


@dataclasses.dataclass(frozen=True)
class Text:
    """A text that a model has made.

    Attributes:
      ids: of all of it.
      num_prompt: how many of them are the prompt's.
    """

    ids: tuple[int, ...]
    num_prompt: int


def rejection(p: Distributions, q: Distributions) -> Float[np.ndarray, "rows"]:
    """Returns how often rejection sampling keeps a guess drawn from q: Σ_i min(p_i, q_i)."""
    return np.minimum(p, q).sum(axis=1)


def same_noise(p: Distributions, q: Distributions) -> Float[np.ndarray, "rows"]:
    """Returns how often draws from p and q with the same noise are one token.

    With the ids in the order of p / q, those after i have the larger p_j / p_i, and those before
    it the larger q_j / q_i, so that two running sums give the sum over j:

        1 / (Σ_{j ≥ i} p_j / p_i + Σ_{j < i} q_j / q_i)
    """
    log_p = np.log(np.maximum(p, TINY))
    log_q = np.log(np.maximum(q, TINY))
    order = np.argsort(log_p - log_q, axis=1)
    p = np.take_along_axis(p, order, axis=1)
    q = np.take_along_axis(q, order, axis=1)

    # p [a, b, c] -> [a + b + c, b + c, c]
    reversed_sums = np.cumsum(p[:, ::-1], axis=1)
    p_from_here = reversed_sums[:, ::-1]
    # q [a, b, c] -> [0, a, a + b]
    q_before = np.cumsum(q, axis=1)
    q_before -= q

    # What either never draws is never the same.
    is_possible = (p > 0) & (q > 0)
    safe_p = np.where(is_possible, p, 1.0)
    safe_q = np.where(is_possible, q, 1.0)
    total = p_from_here / safe_p
    total += q_before / safe_q
    kept = np.where(is_possible, 1 / np.maximum(total, TINY), 0.0)
    return kept.sum(axis=1)


def acceptance(p: Distributions, q: Distributions) -> Acceptance:
    """Returns both in the mean of all rows."""
    same = same_noise(p, q)
    rejected = rejection(p, q)
    return Acceptance(float(same.mean()), float(rejected.mean()), len(p))


def of_model(config: ModelConfig, params: Any, text: Text, temperature: float) -> Distributions:
    """Returns the distribution of each token of an answer, by the model.

    Args:
      config: of the model.
      params: its parameters.
      text: of the answer.
      temperature: above 0.
    """
    inputs = _inputs(text)
    logits = _logits(config, params, inputs)
    # The token at place 5 is drawn from the logits after place 4.
    first = text.num_prompt - 1
    stop = len(text.ids) - 1
    return _softmax(logits[first:stop], temperature)


def of_first_layers(
    config: ModelConfig, params: Any, count: int, text: Text, temperature: float
) -> Distributions:
    """Returns the same by the first layers; those of the parameters are not stacked."""
    first = config.first_layers[:count]
    shallow = dataclasses.replace(config, num_layers=count, first_layers=first)
    return of_model(shallow, params, text, temperature)


def of_mtp(config: ModelConfig, params: Any, text: Text, temperature: float) -> Distributions:
    """Returns the same by the first module of multi-token prediction."""
    inputs = _inputs(text)
    # The token after each; after the last one any.
    inputs["targets"] = np.roll(inputs["tokens"], -1, axis=1)
    logits = _mtp_logits(config, params, inputs)
    # The state after place 3 and the token at place 4 guess the token at place 5.
    first = text.num_prompt - 2
    stop = len(text.ids) - 2
    return _softmax(logits[first:stop], temperature)


def of_lookup(p: Distributions, text: Text) -> Acceptance | None:
    """Returns how often look-up's first guess is kept: q is 1 for one token, and both ways keep it
    with the probability that p gives it. None where it never guesses.

    Args:
      p: of each token of the answer.
      text: of the answer.
    """
    lookup = Lookup()
    kept = []
    for row in range(len(p)):
        place = text.num_prompt + row
        before = text.ids[:place]
        guesses = lookup.propose(before, 1)
        if not guesses:
            continue
        [guess] = guesses
        kept.append(p[row, guess])
    if not kept:
        return None
    mean = float(np.mean(kept))
    return Acceptance(mean, mean, len(kept))


def mean_of(found: Sequence[Acceptance]) -> Acceptance:
    """Returns the mean over texts, each as heavy as it has guesses."""
    same = 0.0
    rejected = 0.0
    guesses = 0
    for each in found:
        same += each.guesses * each.same_noise
        rejected += each.guesses * each.rejection
        guesses += each.guesses
    return Acceptance(same / guesses, rejected / guesses, guesses)


def _inputs(text: Text) -> dict[str, Int[np.ndarray, "1 T"]]:
    positions = np.arange(len(text.ids), dtype=np.int32)
    return {
        "tokens": np.array([text.ids], np.int32),
        "positions": positions[None, :],
    }


def _softmax(logits: Float[Array, "rows V"], temperature: float) -> Distributions:
    scaled = np.asarray(logits, np.float64)
    scaled = scaled / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    weights = np.exp(scaled)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, params: Any, inputs: Any) -> jax.Array:
    model = language_model(config)
    output = model.hidden(params, inputs)
    terms = model.projection(params, output.hidden)
    [logits] = compute_logits(terms)
    return logits


@functools.partial(jax.jit, static_argnums=0)
def _mtp_logits(config: ModelConfig, params: Any, inputs: Any) -> jax.Array:
    model = language_model(config)
    output = model.hidden(params, inputs)
    # Of the first depth.
    hidden, *_ = output.mtp_hidden
    terms = model.projection(params, hidden)
    [logits] = compute_logits(terms)
    return logits
