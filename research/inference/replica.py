"""One replica of the engine: many requests at a time over the pages of one cache, each answered as
if it were alone.
"""

import dataclasses
import itertools
import math
import os
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from research.core.errors import UserError
from research.data.tokenizers import Tokenizer
from research.inference.answers import Answer, Beam, Sample, TokenLogprobs
from research.inference.beam_lanes import BeamLanes, Lane
from research.inference.beam_search import BeamSearch, Hypothesis
from research.inference.pages import PagePool, chain_start
from research.inference.placement import id_rules, one_slot, pack_words
from research.inference.requests import Request
from research.inference.runner import Runner
from research.inference.sampling_config import SamplingConfig
from research.inference.scheduler import Row, Scheduler, Sequence
from research.inference.serve_config import ServeConfig
from research.inference.slots import Drawn, LogprobKind
from research.inference.text import Detokenizer
from research.kernels.decode_attention import PAGE_SIZE
from research.models.config import ModelConfig

NOT_NUMBERS = "its logits are not numbers"
# A search draws nothing.
SEARCHED = SamplingConfig(temperature=0.0)


@dataclasses.dataclass(frozen=True)
class UnderWay:
    """A step under way.

    Attributes:
      rows: of it.
      drawn: from the rows.
      accepted: how many drafts of each slot were right.
      targets: the token whose log-probability is wanted, by row.
      wanted: how many of the likeliest ids are wanted, and whether those that were kept, by row.
    """

    rows: list[Row]
    drawn: Drawn
    accepted: jax.Array
    targets: dict[int, int]
    wanted: dict[int, tuple[int, bool]]

    def extras(self, index: int) -> tuple[tuple[tuple[int, float], ...], np.ndarray | None]:
        """Returns the likeliest ids after a row, and those that were kept, where wanted."""
        count, wants_kept = self.wanted.get(index, (0, False))
        top: tuple[tuple[int, float], ...] = ()
        kept = None
        if count:
            ids = np.asarray(self.drawn.top)[index, :count].tolist()
            logprobs = np.asarray(self.drawn.top_logprobs)[index, :count].tolist()
            top = tuple(zip(ids, logprobs, strict=True))
        if wants_kept:
            kept = np.asarray(self.drawn.kept)[index]
        return top, kept


class Replica:
    """Answers requests by steps, each over all running sequences.

    The host plans a step while the device runs the one before: it reads the tokens of a step when
    the next one is under way, and drops what was drawn after an end.

    Args:
      config: of the model.
      params: its parameters.
      tokenizer: the one it was trained with.
      serve: how it runs.
      mesh: that the parameters are sharded over; None is one device.

    Attributes:
      num_rows: tokens that steps have read so far.
      guessed: tokens that were guessed so far.
      guessed_right: how many of these counted.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        tokenizer: Tokenizer,
        serve: ServeConfig,
        mesh: Mesh | None,
    ):
        self._config = config
        self._tokenizer = tokenizer
        self._serve = serve
        self._num_ids = min(tokenizer.vocab_size, config.vocab_size)
        self._runner = Runner(config, params, serve, self._num_ids, mesh)
        pool = PagePool(self._runner.num_pages)
        self._scheduler = Scheduler(serve.slots, pool, PAGE_SIZE, serve.rows)

        scalings = [config.position_of(layer).scaling for layer in config.layers()]
        self._by_length = any(scaling is not None and scaling.by_length for scaling in scalings)
        # Pages of other parameters are other pages.
        self._params_name = os.urandom(16)
        self._arrivals = itertools.count()
        self._members: dict[Sequence, Sample | Lane] = {}
        self._searches: dict[Answer, BeamLanes] = {}
        self._under_way: UnderWay | None = None
        self.num_rows = 0
        self.guessed = 0
        self.guessed_right = 0

    @property
    def under_way(self) -> bool:
        """Whether a step is not read yet."""
        return self._under_way is not None

    @property
    def available_pages(self) -> int:
        """Pages that no request has."""
        return self._scheduler.pool.available

    @property
    def load(self) -> int:
        """Tokens that its answers under way may yet have."""
        return sum(sequence.limit - sequence.written for sequence in self._members)

    def submit(self, answer: Answer) -> None:
        """Queues a request that was checked, by its answer without samples.

        Raises:
          UserError: settings of a search that do not fit the ids.
        """
        request = answer.request
        arrival = next(self._arrivals)
        if request.beams is not None:
            sequence = self._sequence(request, (-request.priority, arrival, 0))
            sequence.needs_host = True
            end_ids = [i for i in self._tokenizer.end_ids if i < self._num_ids]
            search = BeamSearch(sequence.tokens, request.beams, self._num_ids, end_ids)
            lane = Lane(answer, sequence)
            self._searches[answer] = BeamLanes(search, lane)
            self._add(lane)
            return
        for index in range(request.num_samples):
            sequence = self._sequence(request, (-request.priority, arrival, index))
            if index:
                sequence.leader = answer.samples[0].sequence
            elif request.prompt_logprobs is not None:
                sequence.reads_all = True
            prompt = [] if self._config.structure == "encoder_decoder" else request.ids
            text = Detokenizer(
                self._tokenizer,
                prompt,
                stop=request.sampling.stop,
                max_tokens=request.max_tokens,
                stop_ids=request.sampling.stop_ids,
            )
            sample = Sample(answer, index, sequence, text)
            answer.samples.append(sample)
            self._add(sample)

    def _add(self, member: Sample | Lane) -> None:
        self._members[member.sequence] = member
        self._scheduler.add(member.sequence)

    def _sequence(self, request: Request, order: tuple[int, ...]) -> Sequence:
        tokens = list(request.ids)
        if self._config.structure == "encoder_decoder":
            tokens = [self._config.decoder_start_id]
        limit = len(tokens) + request.max_tokens
        sequence = Sequence(order, tokens, limit, self._chain_start(request, limit))
        if self._config.structure == "prefix":
            sequence.in_one_piece = len(tokens)
        return sequence

    def _chain_start(self, request: Request, limit: int) -> bytes | None:
        """Returns what the digests of a sequence's pages begin with; None where its keys are not
        those of its tokens alone, and so nobody else's.
        """
        if self._config.structure != "decoder" or not self._serve.prefix_cache:
            return None
        fields = {"params": self._params_name, "salt": request.salt.encode()}
        if self._by_length:
            fields["limit"] = str(limit).encode()
        return chain_start(fields)

    def abort(self, answer: Answer, error: str) -> None:
        """Ends a request, in whatever state it is: its pages are free for the next step."""
        for sample in answer.samples:
            if not sample.finished:
                sample.error = error
            self._end(sample)
        if answer in self._searches:
            answer.error = error
            self._end_search(answer)

    def update_params(self, params: Any) -> None:
        """Goes on with other parameters of the same shapes, in running answers too, whose tokens so
        far are read again.
        """
        self._read_under_way()
        self._scheduler.restart()
        self._params_name = os.urandom(16)
        for sequence, member in self._members.items():
            sequence.rename(self._chain_start(member.answer.request, sequence.limit))
        self._runner.params = params

    def run_step(self) -> bool:
        """Starts a step and reads the one before; returns whether there is more to do."""
        self._end_late_ones()
        count = self._drafts_of_each()
        for sequence in self._scheduler.running:
            member = self._members[sequence]
            sequence.needs_host = isinstance(member, Lane) or self._guesses(member, count)
        if any(sequence.needs_host for sequence in self._scheduler.running):
            self._read_under_way()
        for sequence in self._scheduler.running:
            self._guess(sequence, count)
        rows = self._scheduler.plan()
        self.num_rows += len(rows)
        started = self._start(rows) if rows else None
        self._read_under_way()
        self._under_way = started
        return bool(self._members)

    def _drafts_of_each(self) -> int:
        """Returns how many guesses each answer may have: as many as fit in a tile with all newest
        tokens, where they cost little.
        """
        running = len(self._scheduler.running)
        if self._serve.speculate == "none" or not running:
            return 0
        return min(self._serve.drafts, (self._serve.tiles[-1] - running) // running)

    def _guesses(self, sample: Sample, count: int) -> bool:
        return count > 0 and sample.answer.request.speculate and sample.gate.allows()

    def _guess(self, sequence: Sequence, count: int) -> None:
        """Gives an answer guesses of its next tokens."""
        member = self._members.get(sequence)
        if not isinstance(member, Sample) or not sequence.needs_host or not sequence.is_answering:
            return
        # The last token allowed is never read.
        room = sequence.limit - 1 - sequence.length
        count = min(count, room)
        if count > 0:
            sequence.drafts = tuple(member.lookup.propose(sequence.tokens, count))

    def _end_late_ones(self) -> None:
        now = time.monotonic()
        for answer in {member.answer for member in self._members.values()}:
            if answer.ends_at is not None and now > answer.ends_at:
                self.abort(answer, "deadline")

    def _start(self, rows: list[Row]) -> UnderWay:
        admitted = self._scheduler.take_admitted()
        for sequence in admitted:
            # What it had in an earlier stay may be another's now.
            self._members[sequence].memory = None
        for sequence in admitted:
            self._place(sequence)
        for sequence in {row.sequence for row in rows}:
            table = self._runner.table[sequence.slot]
            table[:] = 0
            table[: len(sequence.pages)] = sequence.pages

        targets = {}
        extras = {}
        masks = {}
        for index, row in enumerate(rows):
            member = self._members[row.sequence]
            request = member.answer.request
            if isinstance(member, Lane):
                extras[index] = (self._serve.top_logprobs * row.draws, False)
                masks |= self._search_masks(member, row)
                continue
            wanted = request.logprobs
            if self._is_of_prompt(member, row):
                targets[index] = row.sequence.tokens[row.position + 1]
                wanted = request.prompt_logprobs
            if row.draws or index in targets:
                extras[index] = (wanted, request.kept)
        wants = {index for index, wanted in extras.items() if any(wanted)}
        drawn, accepted = self._runner.run(rows, targets, wants, masks)
        return UnderWay(rows, drawn, accepted, targets, extras)

    def _search_masks(self, lane: Lane, row: Row) -> dict[int, np.ndarray]:
        """Returns which ids may continue a lane, by slot, where not all may."""
        allowed = self._searches[lane.answer].allowed(lane)
        if allowed is None or not row.draws:
            return {}
        return {row.slot: pack_words(allowed)[None]}

    def _is_of_prompt(self, sample: Sample, row: Row) -> bool:
        """Returns whether a row tells the log-probability of a token of the prompt, which is not
        known yet.
        """
        answer = sample.answer
        if answer.request.prompt_logprobs is None or sample is not answer.samples[0]:
            return False
        is_in_prompt = row.position + 1 < len(answer.request.ids)
        return is_in_prompt and row.position + 1 not in answer.prompt_logprobs

    def _place(self, sequence: Sequence) -> None:
        """Puts a sequence into its slot, and has read what is read in one piece."""
        slot = sequence.slot
        assert slot is not None
        member = self._members[sequence]
        request = member.answer.request
        is_lane = isinstance(member, Lane)
        memory = slot
        if self._config.structure == "encoder_decoder":
            memory = self._memory_row(member)
        if sequence.reads_piece:
            self._runner.table[slot] = 0
            self._runner.table[slot, : len(sequence.pages)] = sequence.pages
            self._runner.read_prefix(slot, request.ids)
        sampling = SEARCHED if is_lane else request.sampling
        num_prompt = sequence.limit - request.max_tokens
        rules = id_rules(sequence, num_prompt, sampling, self._tokenizer.end_ids, self._num_ids)
        kind = LogprobKind.ALLOWED if is_lane else request.logprob_kind
        seed = 0 if is_lane else member.seed
        placed = one_slot(sequence, sampling, seed, memory, kind, rules, self._serve.drafts)
        self._runner.place(slot, placed)

    def _memory_row(self, member: Sample | Lane) -> int:
        """Returns the row of the memory that has what the encoder reads for a request, which all
        its sequences share.
        """
        rows = {}
        for sequence in self._scheduler.running:
            other = self._members[sequence]
            if other.memory is not None and other is not member:
                rows[other.answer] = other.memory
        member.memory = rows.get(member.answer)
        if member.memory is None:
            taken = set(rows.values())
            member.memory = next(row for row in range(self._serve.slots) if row not in taken)
            self._runner.read_source(member.memory, member.answer.request.ids)
        return member.memory

    def _read_under_way(self) -> None:
        """Reads what a step drew, and ends the answers that are finished."""
        if self._under_way is None:
            return
        step = self._under_way
        self._under_way = None
        host = jax.tree.map(np.asarray, (step.drawn.token, step.drawn.logprob, step.accepted))
        tokens, logprobs, right = (array.tolist() for array in host)
        drawn: dict[Sample, list[TokenLogprobs]] = {}
        full = []
        for index, row in enumerate(step.rows):
            member = self._members.get(row.sequence)
            # Ended since, or after a draft that was wrong.
            if member is None or row.draft > right[row.slot]:
                continue
            if isinstance(member, Lane):
                if row.draws and self._collect(member, step, index):
                    full.append(member.answer)
                continue
            extras = step.extras(index)
            if row.draws:
                found = TokenLogprobs(tokens[index], logprobs[index], *extras)
                drawn.setdefault(member, []).append(found)
            elif index in step.targets:
                found = TokenLogprobs(step.targets[index], logprobs[index], *extras)
                member.answer.prompt_logprobs[row.position + 1] = found
        for sample, found in drawn.items():
            self._push(sample, found)
        for answer in full:
            self._advance(answer)

    def _push(self, sample: Sample, found: list[TokenLogprobs]) -> None:
        guessed = len(sample.sequence.drafts)
        sample.gate.observe(guessed, len(found) - 1)
        self.guessed += guessed
        self.guessed_right += len(found) - 1 if guessed else 0
        sample.sequence.add([each.token for each in found])
        for each in found:
            if math.isnan(each.logprob):
                # Of this request alone: the others' rows do not see it.
                sample.error = NOT_NUMBERS
            if not sample.finished:
                sample.push(each)
        if sample.finished:
            self._end(sample)

    def _collect(self, lane: Lane, step: UnderWay, index: int) -> bool:
        """Takes the likeliest continuations of a lane; returns whether its search has all."""
        ids = np.asarray(step.drawn.top)[index]
        log_p = np.asarray(step.drawn.top_logprobs)[index]
        if np.isnan(log_p).any():
            self.abort(lane.answer, NOT_NUMBERS)
            return False
        return self._searches[lane.answer].collect(lane, ids, log_p)

    def _advance(self, answer: Answer) -> None:
        """Extends the hypotheses of a search, and ends it where none goes on."""
        lanes = self._searches[answer]
        changes = lanes.advance(self._scheduler)
        self._runner.copy_pages(changes.copies)
        for lane in changes.begun:
            self._members[lane.sequence] = lane
        for lane in changes.ended:
            self._end(lane)
        if lanes.search.active:
            return
        try:
            found = lanes.search.hypotheses()
            answer.beams = [self._beam(answer.request, each) for each in found]
        except UserError as error:
            answer.error = str(error)
        self._end_search(answer)

    def _beam(self, request: Request, found: Hypothesis) -> Beam:
        prompt = [] if self._config.structure == "encoder_decoder" else request.ids
        text = Detokenizer(self._tokenizer, prompt, stop=(), max_tokens=request.max_tokens)
        for token in found.tokens:
            text.push(token)
        completion = text.completion()
        return Beam(**vars(completion), score=found.score)

    def _end_search(self, answer: Answer) -> None:
        for lane in self._searches.pop(answer).lanes:
            self._end(lane)

    def _end(self, member: Sample | Lane) -> None:
        self._scheduler.end(member.sequence)
        self._members.pop(member.sequence, None)
