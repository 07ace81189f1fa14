"""The settings of sampling, and the same as arrays by row."""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from research.core.config import check_types
from research.core.errors import UserError
from research.core.random import SEEDS

# Of functions and commands that make a text at once, where none is given: the text can be made
# again.
USUAL_SEED = 0


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Settings of sampling from a model.

    Attributes:
      max_tokens: new tokens at most.
      min_tokens: new tokens before an end of text, at least; it says nothing of stop strings.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: keeps the k likeliest tokens, and those as likely as the last of them; 0 keeps all.
      top_p: keeps the fewest likeliest tokens that together reach this probability; 1 keeps all.
      min_p: keeps tokens of at least this fraction of the likeliest one's probability; 0 keeps all.
      typical_p: keeps the fewest tokens that together reach this probability, those first whose
          surprise is nearest to the entropy; 1 keeps all.
      repetition_penalty: above 1 makes tokens that the text already has less likely; in
          [1e-30, 1e30].
      presence_penalty: is taken from the logits of tokens that the answer already has.
      frequency_penalty: is taken from the logits of tokens once for each time that the answer
          already has them.
      logit_bias: pairs of an id and what is added to its logit.
      seed: of the first sequence, in [0, 2⁶⁴); the next ones take the next numbers, and 0 after the
          last. With None an engine draws one, which its answer says.
      stop: strings that end a text; they are not part of it.
      stop_ids: ids that end a text, beside those of the tokenizer.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_types(self)
        # Within its bounds a repetition penalty leaves logits finite in float32.
        for name, holds, constraint in (
            ("max_tokens", self.max_tokens >= 1, "be at least 1"),
            (
                "min_tokens",
                0 <= self.min_tokens <= self.max_tokens,
                f"lie in [0, max_tokens = {self.max_tokens}]",
            ),
            ("temperature", self.temperature >= 0, "not be below 0"),
            ("top_k", self.top_k >= 0, "not be below 0"),
            ("top_p", 0 < self.top_p <= 1, "lie in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "lie in [0, 1]"),
            ("typical_p", 0 < self.typical_p <= 1, "lie in (0, 1]"),
            (
                "repetition_penalty",
                1e-30 <= self.repetition_penalty <= 1e30,
                "lie in [1e-30, 1e30]",
            ),
            ("presence_penalty", abs(self.presence_penalty) <= 1e30, "lie in [-1e30, 1e30]"),
            ("frequency_penalty", abs(self.frequency_penalty) <= 1e30, "lie in [-1e30, 1e30]"),
            (
                "logit_bias",
                all(abs(bias) <= 1e30 for _, bias in self.logit_bias),
                "have values in [-1e30, 1e30]",
            ),
            ("seed", 0 <= (self.seed or 0) < SEEDS, f"lie in [0, {SEEDS})"),
            ("stop", all(self.stop), "hold no empty string"),
        ):
            if not holds:
                raise UserError(name, getattr(self, name), f"must {constraint}.")

    def with_seed(self) -> "SamplingConfig":
        """Returns the settings with a seed: `USUAL_SEED` where they have none."""
        if self.seed is not None:
            return self
        return dataclasses.replace(self, seed=USUAL_SEED)

    def check_ids(self, num_ids: int) -> None:
        """Raises UserError where an id is not in [0, `num_ids`)."""
        for name, ids in (
            ("logit_bias", [i for i, _ in self.logit_bias]),
            ("stop_ids", self.stop_ids),
        ):
            for i in ids:
                if not 0 <= i < num_ids:
                    raise UserError(
                        name, constraint=f": id {i} is out of range: it must lie in [0, {num_ids})."
                    )


@flax.struct.dataclass
class SamplingParams:
    """The settings of each row of a batch, as arrays: rows may differ, and other values need no new
    compilation.

    Attributes:
      temperature, top_k, top_p, min_p, typical_p, repetition_penalty, presence_penalty,
        frequency_penalty: as of `SamplingConfig`.
    """

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    typical_p: Float[Array, "B"]
    repetition_penalty: Float[Array, "B"]
    presence_penalty: Float[Array, "B"]
    frequency_penalty: Float[Array, "B"]

    @classmethod
    def of(cls, configs: Sequence[SamplingConfig]) -> "SamplingParams":
        """Returns the settings of rows with these configs."""
        smallest = float(np.finfo(np.float32).tiny)
        largest = float(np.finfo(np.float32).max)
        temperatures = []
        for config in configs:
            temperature = config.temperature
            if temperature > 0:
                # One that float32 rounds to 0 is low, but not greedy; one that it rounds to
                # infinity is high.
                temperature = min(max(temperature, smallest), largest)
            temperatures.append(temperature)

        # No vocabulary has more ids than an int32 can count.
        top_k = [min(config.top_k, np.iinfo(np.int32).max) for config in configs]
        # With top_p = 0 no token would stay, not even the likeliest.
        top_p = [max(config.top_p, smallest) for config in configs]
        typical_p = [max(config.typical_p, smallest) for config in configs]
        min_p = [config.min_p for config in configs]
        repetition = [config.repetition_penalty for config in configs]
        presence = [config.presence_penalty for config in configs]
        frequency = [config.frequency_penalty for config in configs]

        return cls(
            temperature=jnp.asarray(temperatures, jnp.float32),
            top_k=jnp.asarray(top_k, jnp.int32),
            top_p=jnp.asarray(top_p, jnp.float32),
            min_p=jnp.asarray(min_p, jnp.float32),
            typical_p=jnp.asarray(typical_p, jnp.float32),
            repetition_penalty=jnp.asarray(repetition, jnp.float32),
            presence_penalty=jnp.asarray(presence, jnp.float32),
            frequency_penalty=jnp.asarray(frequency, jnp.float32),
        )
