"""One replica of the engine: many requests at a time over the pages of one cache, each answered as
if it were alone.
"""

import functools
import itertools
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from research.core.interrupts import delayed_signals
from research.data.tokenizers import Tokenizer
from research.inference.answers import NOT_NUMBERS, Answer, Sample, TokenLogprobs
from research.inference.bad_values import explain
from research.inference.beam_lanes import Lane
from research.inference.grammar import GrammarCompiler
from research.inference.grammar_config import GrammarError
from research.inference.guided import masks_after
from research.inference.id_masks import num_words
from research.inference.members import Members
from research.inference.page_kinds import PageKind
from research.inference.page_names import PageNames
from research.inference.page_transfer import PageTransfer
from research.inference.pages import PagePool
from research.inference.placement import id_rules, one_slot
from research.inference.requests import Request
from research.inference.runner import Runner
from research.inference.sampling_config import SamplingConfig
from research.inference.scheduler import Scheduler
from research.inference.searches import Searches
from research.inference.sequence import Row, Sequence
from research.inference.serve_config import ServeConfig
from research.inference.slots import LogprobKind
from research.inference.speculation.guesses import Guesses
from research.inference.speculation.kinds import drafter_of
from research.inference.text import Detokenizer
from research.inference.under_way import UnderWay, is_of_prompt
from research.models.config import ModelConfig
from research.models.language_model import LanguageModelConfig

# A search draws nothing.
SEARCHED = SamplingConfig(temperature=0.0)


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
      draft: config and parameters of a smaller model that guesses, or None.
      params_digest: as of `Engine`.
      adapters: as of `Engine`.

    Attributes:
      num_steps: taken so far.
      num_rows: tokens that steps have read so far.
      guesses: of its answers.
      members: what it is answering.
      transfer: takes pages out of it, and puts those of others into it; None without `transfers`.
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        params: Any,
        tokenizer: Tokenizer,
        serve: ServeConfig,
        mesh: Mesh | None,
        draft: tuple[ModelConfig, Any] | None,
        params_digest: bytes | None,
        adapters: Mapping[str, bytes],
    ):
        self._config = config
        self._tokenizer = tokenizer
        self._serve = serve
        self._num_ids = min(tokenizer.vocab_size, config.vocab_size)
        drafter = drafter_of(serve, config, params, draft)
        self.guesses = Guesses(serve, on_device=drafter is not None)
        draft_params = None if draft is None else draft[1]
        self._runner = Runner(config, params, serve, self._num_ids, mesh, drafter, draft_params)
        kinds = []
        for count, window in zip(self._runner.num_pages, self._runner.windows, strict=True):
            kinds.append(PageKind(PagePool(count), serve.page_size, window))
        self._scheduler = Scheduler(serve.slots, kinds, serve.rows)
        self._names = PageNames(config, serve, params_digest, adapters)
        self._explain = functools.partial(explain, serve, config, self._runner, self._names)
        self.transfer: PageTransfer | None = None
        if serve.transfers:
            self.transfer = PageTransfer(self._runner, kinds, self._names, self._begin_again)
        self._arrivals = itertools.count()
        self.members = Members()
        has_encoder = config.structure == "encoder_decoder"
        self._searches = Searches(tokenizer, self._num_ids, has_encoder=has_encoder)
        self._grammars: GrammarCompiler | None = None
        self._under_way: UnderWay | None = None
        self.num_steps = 0
        self.num_rows = 0

    @property
    def params(self) -> Any:
        """Parameters as its steps read them."""
        return self._runner.params

    @property
    def under_way(self) -> bool:
        """Whether a step is not read yet."""
        return self._under_way is not None

    @property
    def available_pages(self) -> tuple[int, ...]:
        """Pages that no request has, of each kind of layers."""
        return tuple(kind.pool.available for kind in self._scheduler.kinds)

    def submit(self, answer: Answer) -> None:
        """Queues a request that was checked, by its answer without samples.

        Raises:
          UserError: settings of a search that do not fit the ids.
        """
        request = answer.request
        arrival = next(self._arrivals)
        if request.beams is not None:
            sequence = self._sequence(request, (-request.priority, arrival, 0))
            self._add(self._searches.begin(answer, sequence))
            self.members.time(answer, arrival)
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
            if request.grammar is not None:
                sample.matcher = self._compiler().matcher(request.grammar)
                sequence.needs_host = True
            answer.samples.append(sample)
        for sample in answer.samples:
            self._add(sample)
        self.members.time(answer, arrival)

    def _compiler(self) -> GrammarCompiler:
        if self._grammars is None:
            self._grammars = GrammarCompiler(self._tokenizer, num_ids=self._num_ids)
        return self._grammars

    def _add(self, member: Sample | Lane) -> None:
        self.members.add(member)
        self._scheduler.add(member.sequence)

    def _sequence(self, request: Request, order: tuple[int, ...]) -> Sequence:
        tokens = list(request.ids)
        if self._config.structure == "encoder_decoder":
            tokens = [self._config.decoder_start_id]
        limit = len(tokens) + request.max_tokens
        sequence = Sequence(order, tokens, limit, self._names.start(request, limit))
        if self._config.structure == "prefix":
            sequence.in_one_piece = len(tokens)
        return sequence

    def abort(self, answer: Answer, error: str) -> None:
        """Ends a request, in whatever state it is: its pages are free for the next step."""
        for sample in answer.samples:
            if not sample.finished:
                sample.error = error
            self._end(sample)
        if answer.request.beams is not None and not answer.finished:
            answer.error = error
        for lane in self._searches.end(answer):
            self._end(lane)

    def update_params(self, params: Any, params_digest: bytes | None) -> None:
        """Goes on with other parameters of the same shapes, in running answers too, whose tokens so
        far are read again.
        """
        self._read_under_way()
        with delayed_signals():
            self._scheduler.restart()
            self._names.rename_params(params_digest)
            for sequence, member in self.members.items():
                sequence.rename(self._names.start(member.answer.request, sequence.limit))
            self._runner.params = params

    def run_step(self) -> bool:
        """Starts a step and reads the one before; returns whether there is more to do.

        A step that is broken off, as by Ctrl-C, may be run again: all running answers are then read
        anew, and nobody finds the pages that it may have left unwritten.
        """
        try:
            return self._run_step()
        except BaseException:
            self._begin_again()
            raise

    def _begin_again(self) -> None:
        """Has all running answers read anew."""
        self._under_way = None
        self._scheduler.restart()
        self._runner.recover()

    def _run_step(self) -> bool:
        with delayed_signals():
            self._end_late_ones()
        self._prepare()
        with delayed_signals():
            rows = self._scheduler.plan()
        self.num_rows += len(rows)
        self.num_steps += bool(rows)
        started = self._start(rows) if rows else None
        self._read_under_way()
        self._under_way = started
        return bool(self.members)

    def _prepare(self) -> None:
        """Reads the step under way where the next one depends on it, and has guesses made."""
        running = self._scheduler.running
        most = self.guesses.most(len(running))
        for sequence in running:
            member = self.members[sequence]
            is_searched = isinstance(member, Lane)
            # Where the newest token is, is not known until its drafts are read.
            is_guided = is_searched or member.matcher is not None or len(sequence.drafts) > 0
            sequence.needs_host = is_guided or self.guesses.wanted(member, most)
        if any(sequence.needs_host for sequence in running):
            self._read_under_way()
        members = [self.members[sequence] for sequence in running]
        samples = [member for member in members if isinstance(member, Sample)]
        on_device = self.guesses.make(samples, most, self.num_steps)
        if on_device:
            self._write_tables()
            self._runner.propose(on_device)

    def _end_late_ones(self) -> None:
        for answer in self.members.late(time.monotonic()):
            self.abort(answer, "deadline")

    def _start(self, rows: list[Row]) -> UnderWay:
        admitted = self._scheduler.take_admitted()
        for sequence in admitted:
            # What it had in an earlier stay may be another's now.
            self.members[sequence].memory = None
        for sequence in admitted:
            self._place(sequence)
        self._write_tables()
        targets = {}
        extras = {}
        for index, row in enumerate(rows):
            member = self.members[row.sequence]
            request = member.answer.request
            if isinstance(member, Lane):
                extras[index] = (self._serve.top_logprobs * row.draws, False)
                continue
            wanted = request.logprobs
            if is_of_prompt(member, row):
                targets[index] = row.sequence.tokens[row.position + 1]
                wanted = request.prompt_logprobs
            if row.draws or index in targets:
                extras[index] = (wanted, request.kept)
        wants = {index for index, wanted in extras.items() if any(wanted)}
        step = self._runner.read(rows, targets, wants)
        # The device reads the tokens while the host makes the masks.
        drawn, accepted = self._runner.draw(step, self._masks(rows))
        return UnderWay(rows, drawn, accepted, targets, extras)

    def _write_tables(self) -> None:
        """Writes the pages of all running sequences into the tables."""
        for sequence in self._scheduler.running:
            self._runner.tables.write(sequence.slot, sequence.pages)

    def _masks(self, rows: list[Row]) -> dict[int, np.ndarray]:
        """Returns which ids may come next, by slot, where that has changed."""
        masks = {}
        guided = {}
        for row in rows:
            member = self.members[row.sequence]
            if not row.draws or row.draft:
                continue
            if isinstance(member, Lane):
                mask = self._searches.mask(member)
                if mask is not None:
                    masks[row.slot] = mask
            elif member.matcher is not None:
                guided[member.matcher] = (member, row)
        if not guided:
            return masks
        drafts = {matcher: row.sequence.drafts for matcher, (_, row) in guided.items()}
        for matcher, found in masks_after(self._compiler(), drafts).items():
            sample, row = guided[matcher]
            if isinstance(found, GrammarError):
                # What is drawn from the row is not read.
                sample.error = str(found)
            else:
                masks[row.slot] = found[:, : num_words(self._num_ids)]
        return masks

    def _place(self, sequence: Sequence) -> None:
        """Puts a sequence into its slot, and has read what is read in one piece."""
        slot = sequence.slot
        assert slot is not None
        member = self.members[sequence]
        request = member.answer.request
        is_lane = isinstance(member, Lane)
        memory = slot
        if self._config.structure == "encoder_decoder":
            memory, is_read = self.members.memory_row(member, self._scheduler.running)
            if not is_read:
                self._runner.read_source(memory, request.ids)
        if sequence.reads_piece:
            self._runner.tables.write(slot, sequence.pages)
            self._runner.read_prefix(slot, request.ids)
        sampling = SEARCHED if is_lane else request.sampling
        num_prompt = sequence.limit - request.max_tokens
        rules = id_rules(sequence, num_prompt, sampling, self._tokenizer.end_ids, self._num_ids)
        kind = LogprobKind.ALLOWED if is_lane else request.logprob_kind
        seed = 0 if is_lane else member.seed
        adapter = self._names.adapter_index(request.adapter)
        drafts = self._serve.drafts
        placed = one_slot(sequence, sampling, seed, memory, kind, rules, drafts, adapter)
        self._runner.place(slot, placed)

    def _read_under_way(self) -> None:
        """Reads what a step drew, and ends the answers that are finished."""
        if self._under_way is None:
            return
        step = self._under_way
        found = step.read()
        # All of it is taken or nothing.
        with delayed_signals():
            self._under_way = None
            self._take(step, found)

    def _take(self, step: UnderWay, tokens: list[TokenLogprobs | None]) -> None:
        drawn: dict[Sample, list[TokenLogprobs]] = {}
        full = []
        for index, (row, found) in enumerate(zip(step.rows, tokens, strict=True)):
            member = self.members.get(row.sequence)
            # Ended since.
            if member is None or found is None:
                continue
            if isinstance(member, Lane):
                if self._collect(member, *step.top(index)):
                    full.append(member.answer)
            elif row.draws:
                drawn.setdefault(member, []).append(found)
                member.drawn_at = (self.num_steps, index)
            else:
                member.answer.prompt_logprobs[row.position + 1] = found
        for sample, found in drawn.items():
            self._push(sample, found)
        for answer in full:
            changes = self._searches.advance(answer, self._scheduler)
            self._runner.copy_pages(changes.copies)
            for lane in changes.begun:
                self.members.add(lane)
            for lane in changes.ended:
                self._end(lane)

    def _push(self, sample: Sample, found: list[TokenLogprobs]) -> None:
        self.guesses.observe(sample, len(found))
        sample.sequence.add([each.token for each in found])
        for each in found:
            sample.push(each)
        if sample.error == NOT_NUMBERS:
            num_drawn = len(sample.logprobs)
            sample.error = self._explain(sample.answer.request, sample.sequence, num_drawn)
        if sample.finished:
            self._end(sample)

    def _collect(self, lane: Lane, ids: np.ndarray, log_p: np.ndarray) -> bool:
        """Takes the likeliest continuations of a lane; returns whether its search has all."""
        if np.isnan(log_p).any():
            self.abort(lane.answer, self._explain(lane.answer.request, lane.sequence))
            return False
        return self._searches.collect(lane, ids, log_p)

    def _end(self, member: Sample | Lane) -> None:
        self._scheduler.end(member.sequence)
        self.members.remove(member)
