"""Requests answered under each condition that must not change an answer, and their comparison bit
for bit.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from research.bench.drawn_requests import other_seed
from research.bench.exactness_answers import Count, Found
from research.bench.exactness_models import random_params
from research.data.tokenizers import ByteTokenizer
from research.inference.answers import Answer, Sample
from research.inference.engine import Engine
from research.inference.requests import Request
from research.inference.sampling_config import SamplingConfig
from research.inference.serve_config import ServeConfig
from research.models.config import HeadConfig, ModelConfig

# A draft reads as many rows as this and one more.
DRAFTS = 3
SLOTS = 4
# Rows of a step: one, some or all of a prompt of 128 tokens.
CHUNKS = (16, 40, 160)
TILES = (2, 8, 16)
# Types of pages in fewer bits than the models have.
NARROW_CACHES = ("int8", "float8_e4m3fn")
# Steps of a group of requests: far more than all its tokens.
MOST_STEPS = 100_000
# Steps after which others are ended, at most.
OTHERS_STEPS = 30


@dataclasses.dataclass(frozen=True)
class Condition:
    """How requests come to an engine.

    Attributes:
      mixed: all at once rather than one after the other.
      warm: whether the engine has read their prompts before.
      streamed: whether their text is taken as it comes.
      cancelled: whether others beside them are ended before their time.
    """

    mixed: bool = False
    warm: bool = False
    streamed: bool = False
    cancelled: bool = False


CONDITIONS = [Condition(*values) for values in itertools.product((False, True), repeat=4)]


def kinds(config: ModelConfig) -> list[dict[str, Any]]:
    """Returns the kinds of guesses that a model may have, as fields of `ServeConfig`; none is the
    first, and look-up the second.
    """
    names = ["none", "lookup"]
    if config.structure == "decoder":
        names += ["first_layers", "draft"]
    if config.head.mtp_depth:
        names.append("mtp")
    found = []
    for name in names:
        fields: dict[str, Any] = {"speculate": name, "drafts": DRAFTS * (name != "none")}
        fields["draft_layers"] = int(name == "first_layers")
        found.append(fields)
    return found


def engines(config: ModelConfig) -> list[ServeConfig]:
    """Returns the ways in which an engine may run: sizes of chunks × room for all sequences or for
    one × kinds of guesses.
    """
    found = []
    for rows, tokens, kind in itertools.product(CHUNKS, rooms(config), kinds(config)):
        serve = ServeConfig(slots=SLOTS, tokens=tokens, rows=rows, tiles=TILES)
        found.append(dataclasses.replace(serve, **kind))
    return found


def rooms(config: ModelConfig) -> tuple[int, int]:
    """Returns the tokens that an engine has room for: those of all sequences, or of one."""
    return (4 * SLOTS * config.max_length, config.max_length)


def few_engines(config: ModelConfig) -> list[ServeConfig]:
    """Returns some of them: each size of chunks, each room without guesses and with look-up, and
    each other kind of guesses once.
    """
    roomy, narrow = rooms(config)
    none, lookup, *others = kinds(config)
    small, medium, large = CHUNKS
    chosen = [(small, roomy, none), (medium, narrow, lookup), (large, roomy, lookup)]
    chosen += [(small, narrow, none), *((medium, narrow, kind) for kind in others)]
    found = []
    for rows, tokens, kind in chosen:
        serve = ServeConfig(slots=SLOTS, tokens=tokens, rows=rows, tiles=TILES)
        found.append(dataclasses.replace(serve, **kind))
    return found


def narrow_engines(config: ModelConfig, cache_dtype: str) -> list[ServeConfig]:
    """Returns the ways of `few_engines`, with pages of another type."""
    few = few_engines(config)
    return [dataclasses.replace(serve, cache_dtype=cache_dtype) for serve in few]


def start_engine(config: ModelConfig, params: Any, serve: ServeConfig) -> Engine:
    """Returns an engine, with a smaller model that guesses where it needs one."""
    draft = None
    if serve.speculate == "draft":
        smaller = dataclasses.replace(config, num_layers=1, first_layers=(), head=HeadConfig())
        draft = (smaller, random_params(smaller))
    return Engine(config, params, ByteTokenizer(), serve, draft=draft)


def answer_alone(
    config: ModelConfig, params: Any, requests: Sequence[Request], serve: ServeConfig
) -> list[Answer]:
    """Returns the answers that all others are compared with: of each request alone, on an engine
    that neither guesses, nor shares pages, nor lacks room.
    """
    tokens, _ = rooms(config)
    serve = dataclasses.replace(serve, **kinds(config)[0], tokens=tokens, prefix_cache=False)
    engine = start_engine(config, params, serve)
    found = []
    for request in requests:
        found += engine.run([request])
    return found


class Trial:
    """Requests under conditions, on one engine.

    Args:
      engine: which.
      seed: of when they come, and which of them others are beside.
    """

    def __init__(self, engine: Engine, seed: int = 0):
        self._engine = engine
        self._random = np.random.default_rng(seed)
        self._salts = itertools.count()
        self._lost: set[tuple[Sample, int]] = set()

    def answer(self, requests: Sequence[Request], condition: Condition) -> list[Found]:
        """Returns the answers to requests under a condition."""
        groups = [requests] if condition.mixed else [[request] for request in requests]
        found: list[Found] = []
        for group in groups:
            found += self._answer_group(group, condition)
        return found

    def count(self) -> Count:
        """Returns what of its conditions has come to pass."""
        right = sum(replica.guesses.right for replica in self._engine.replicas)
        return Count(preempted=len(self._lost), guessed_right=right)

    def _answer_group(self, group: Sequence[Request], condition: Condition) -> list[Found]:
        asked = self._with_salts(group, condition)
        queue: list[tuple[int | None, Request]] = list(enumerate(asked))
        if condition.cancelled:
            # One beside a single request, and as many as half of several.
            queue += [(None, other_seed(each)) for each in asked[::2]]
        self._random.shuffle(queue)

        # They come in any order, some while the first ones run.
        answers: dict[int, Answer] = {}
        others: dict[Answer, int] = {}
        texts: dict[Sample, str] = {}
        step = 0
        while queue or not all(answer.finished for answer in answers.values()):
            arriving = int(self._random.integers(1, 4))
            for index, request in queue[:arriving]:
                answer = self._engine.submit(request)
                if index is None:
                    others[answer] = step + int(self._random.integers(0, OTHERS_STEPS))
                else:
                    answers[index] = answer
            queue = queue[arriving:]
            self._abort(answer for answer, end in others.items() if step >= end)
            self._engine.run_step()
            assert step < MOST_STEPS, "the engine takes steps, and no answer ends"
            self._watch(answers.values(), texts, streamed=condition.streamed)
            step += 1
        self._abort(others)
        return [self._found(answers[index], texts) for index in range(len(asked))]

    def _with_salts(self, group: Sequence[Request], condition: Condition) -> list[Request]:
        """Returns requests that share pages with each other where the engine is to have read their
        prompts, and else with nobody.
        """
        salt = f"trial {next(self._salts)}"
        asked = []
        for index, request in enumerate(group):
            own = salt if condition.warm else f"{salt}, {index}"
            asked.append(dataclasses.replace(request, salt=own))
        if condition.warm:
            for request in asked:
                # Of the same limit, on which pages may depend.
                sampling = SamplingConfig(max_tokens=request.max_tokens, seed=0)
                answer = self._engine.submit(Request(request.ids, sampling, salt=salt))
                while not answer.finished and not answer.samples[0].logprobs:
                    self._engine.run_step()
                self._abort([answer])
        return asked

    def _abort(self, answers: Iterable[Answer]) -> None:
        for answer in answers:
            if not answer.finished:
                self._engine.abort(answer)

    def _watch(
        self, answers: Iterable[Answer], texts: dict[Sample, str], *, streamed: bool
    ) -> None:
        """Takes new text, and notes who has lost its slot after its first token."""
        for answer in answers:
            for sample in answer.samples:
                if streamed:
                    texts[sample] = texts.get(sample, "") + sample.take_text()
                if sample.logprobs and sample.sequence.slot is None and not sample.finished:
                    self._lost.add((sample, len(sample.logprobs)))

    def _found(self, answer: Answer, texts: dict[Sample, str]) -> Found:
        found = Found.of(answer)
        for sample in answer.samples:
            streamed = texts.get(sample)
            if streamed is not None and streamed != sample.completion().text:
                found.told.append(f"streamed as {streamed!r}")
        return found


def compare_conditions(
    engine: Engine,
    requests: Sequence[Request],
    wanted: Sequence[Found],
    conditions: Sequence[Condition],
    shift: int = 0,
) -> Iterator[tuple[Condition, Count]]:
    """Yields how the answers under each condition differ from what they should be. Every request is
    answered under one of the conditions.

    Args:
      engine: which answers.
      requests: all.
      wanted: their answers alone.
      conditions: which.
      shift: request i has condition (i + shift) mod their number: with as many shifts as conditions
        each request meets all.
    """
    trial = Trial(engine, seed=shift)
    for place, condition in enumerate(conditions):
        indices = range((place - shift) % len(conditions), len(requests), len(conditions))
        found = trial.answer([requests[i] for i in indices], condition)
        total = Count()
        for i, each in zip(indices, found, strict=True):
            count = each.compare(wanted[i])
            if count.differing:
                count.first = f"request {i}, {condition}"
            total.add(count)
        yield condition, total
    yield Condition(), trial.count()


def compare_engines(
    config: ModelConfig,
    params: Any,
    requests: Sequence[Request],
    wanted: Sequence[Found],
    settings: Sequence[ServeConfig],
) -> Count:
    """Returns how answers of engines differ from what they should be. Each engine answers every
    request, under another condition than the others do.

    Args:
      config: of the model.
      params: its parameters.
      requests: all.
      wanted: their answers alone.
      settings: of each engine.
    """
    total = Count()
    for index, serve in enumerate(settings):
        engine = start_engine(config, params, serve)
        # 5 and the number of conditions, 16, share no divisor.
        for _, count in compare_conditions(engine, requests, wanted, CONDITIONS, 5 * index):
            if count.first:
                count.first += f", {serve}"
            total.add(count)
    return total
