"""Prompts in, text out: a batch of requests to an engine."""

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from research.core.errors import UserError
from research.core.progress import Progress
from research.core.random import SEEDS
from research.data.tokenizers import Tokenizer
from research.inference.answers import Answer
from research.inference.engine import Engine
from research.inference.grammar_config import GrammarConfig
from research.inference.prompts import Prompt, encode_ids
from research.inference.requests import Request
from research.inference.sampling_config import SamplingConfig
from research.inference.serve_config import ServeConfig, bind_serve
from research.inference.text import Completion
from research.kernels.decode_attention import PAGE_SIZE
from research.models.language_model import LanguageModelConfig

# Sequences of a batch that run at a time, at most.
SLOTS = 16


def generate(
    config: LanguageModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig | Sequence[SamplingConfig],
    seeds: Sequence[Any] | None = None,
    *,
    grammar: GrammarConfig | None = None,
    speculate: str = "none",
    draft_layers: int = 0,
    draft: tuple[LanguageModelConfig, Any] | None = None,
    debug_nans: bool = False,
    mesh: Mesh | None = None,
) -> list[Completion]:
    """Continues each prompt; a prompt's text depends on its own seed and settings, not on the
    others in the batch.

    Args:
      config: the model.
      params: its parameters.
      tokenizer: the one it was trained with.
      prompts: texts, or ids that are used unchanged.
      sampling: how tokens are drawn: for all prompts, or one per prompt. Other values need no new
          compilation.
      seeds: one per prompt, in [0, 2⁶⁴); None takes the seed of each prompt's own `sampling`, and
        where that is one for all, `sampling.seed + i` for prompt i. A seed that `sampling` does not
        say is 0: the same call has the same texts.
      grammar: that all texts keep to; None for none.
      speculate: who guesses, as of `ServeConfig`; it changes no text.
      draft_layers: how many first layers guess, as there.
      draft: config and parameters of a smaller model that guesses, or None.
      debug_nans: whether the first value that is no number is named, as there.
      mesh: that the parameters are sharded over; None is one device.

    Raises:
      UserError: a prompt and its new tokens do not fit the model's positions, no prompts, another
        number of seeds or settings than of prompts, or a grammar that no text keeps to.
    """
    settings = _per_prompt(sampling, len(prompts))
    rows = encode_ids(config, tokenizer, prompts)
    requests = []
    for ids, each, seed in zip(rows, settings, _checked_seeds(seeds, settings), strict=True):
        own = dataclasses.replace(each, seed=seed)
        requests.append(Request(tuple(ids), own, grammar=grammar))

    num_ends = len(tokenizer.end_ids)
    guessing = {"speculate": speculate, "draft_layers": draft_layers}
    serve = serve_config(config, requests, num_ends, debug_nans=debug_nans, **guessing)
    engine = Engine(config, params, tokenizer, serve, mesh, draft)
    answers = run_all(engine, requests, "sample")
    samples = [answer.samples[0] for answer in answers]
    for index, sample in enumerate(samples):
        if sample.error is not None:
            raise UserError("prompts", constraint=f": number {index}: {sample.error}")
    return [sample.completion() for sample in samples]


def run_all(engine: Engine, requests: Sequence[Request], label: str) -> list[Answer]:
    """Answers requests, and shows progress under a label."""
    answers = engine.submit_all(requests)
    left = len(answers)
    with Progress(label, left, unit="texts") as progress:
        while left:
            engine.run_step()
            running = sum(not answer.finished for answer in answers)
            progress.advance(left - running)
            left = running
    return answers


def serve_config(
    config: LanguageModelConfig,
    requests: Sequence[Request],
    num_ends: int,
    *,
    debug_nans: bool = False,
    **guessing: Any,
) -> ServeConfig:
    """Returns how an engine runs for a batch of requests: with room for all that run at a time.

    Args:
      config: of the model.
      requests: at least one.
      num_ends: ids that end a text.
      debug_nans: as of `ServeConfig`.
      guessing: its fields that say who guesses.

    Raises:
      UserError: nobody of this name guesses.
    """
    slots = SLOTS
    running = 0
    longest = 1
    num_top = 1
    for request in requests:
        prompt = 1 if config.structure == "encoder_decoder" else len(request.ids)
        longest = max(longest, min(prompt + request.max_tokens, config.max_length))
        beams = 1 if request.beams is None else request.beams.num_beams
        running += beams
        slots = max(slots, beams)
        num_top = max(num_top, (1 + num_ends) * beams)
    pages = min(running, slots) * -(-longest // PAGE_SIZE)
    # Powers of two, and few tiles, so that few programs are compiled.
    tiles = (8, 16) if 2 < running <= 8 else (2, 16)
    if running > 8:
        tiles = (16,)
    return bind_serve(
        {
            "slots": _power_of_two(slots),
            "tokens": _power_of_two(pages) * PAGE_SIZE,
            "tiles": tiles,
            "top_logprobs": _power_of_two(num_top),
            "debug_nans": debug_nans,
            **guessing,
        }
    )


def _power_of_two(count: int) -> int:
    """Returns a count rounded up to a power of two."""
    return 1 << (count - 1).bit_length()


def _per_prompt(
    sampling: SamplingConfig | Sequence[SamplingConfig], count: int
) -> list[SamplingConfig]:
    """Returns the settings of each prompt, with their seeds; one for all gives prompt i the seed
    `seed + i`.
    """
    if isinstance(sampling, SamplingConfig):
        first = sampling.with_seed().seed
        seeds = [(first + i) % SEEDS for i in range(count)]
        return [dataclasses.replace(sampling, seed=seed) for seed in seeds]
    if len(sampling) != count:
        raise UserError(
            "sampling",
            constraint=f": {len(sampling)} settings for {count} prompts; give one per prompt, or "
            "one for all.",
        )
    return [each.with_seed() for each in sampling]


def _checked_seeds(seeds: Sequence[Any] | None, settings: Sequence[SamplingConfig]) -> list[int]:
    """Returns the seeds, where none are given those of the settings; raises UserError where they
    are not one per prompt, or no 64-bit numbers.
    """
    if seeds is None:
        seeds = [each.seed for each in settings]
    count = len(settings)
    if len(seeds) != count:
        raise UserError(
            "seeds", constraint=f": {len(seeds)} of them for {count} prompts; give one per prompt."
        )
    for seed in seeds:
        # A bool is an int to Python.
        is_whole = isinstance(seed, numbers.Integral) and not isinstance(seed, bool)
        if not is_whole or not 0 <= seed < SEEDS:
            raise UserError(
                "seeds", constraint=f": {seed!r} must be a whole number in [0, {SEEDS})."
            )
    return [int(seed) for seed in seeds]
