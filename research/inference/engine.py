"""The engine: many requests at a time over the pages of one cache, each answered as if it were
alone.
"""

import dataclasses
import itertools
from collections.abc import Sequence as Rows
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.core.errors import UserError
from research.core.random import keys_of
from research.data.tokenizers import Tokenizer
from research.inference.pages import PagePool, chain_start
from research.inference.programs import (
    DeviceState,
    Drawn,
    StepRows,
    admit,
    empty_slots,
    read_prefix,
    read_source,
    step,
)
from research.inference.prompts import check_room
from research.inference.sampling import SamplingConfig, SamplingParams
from research.inference.scheduler import Row, Scheduler, Sequence
from research.inference.text import Completion, Detokenizer
from research.kernels.decode_attention import PAGE_SIZE
from research.models.config import ModelConfig
from research.models.language_model import language_model
from research.models.paged_cache import PageTable


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """How an engine runs.

    Attributes:
      slots: sequences that run at a time, at most.
      tokens: of all sequences that the cache holds, at most.
      rows: tokens of a step, at most: those of prompts beside one of each running sequence.
      tiles: rows that a compiled step takes at a time, in rising order. With fewer rows than the
        largest tile, a step takes the smallest tile that they fit in.
    """

    slots: int = 16
    tokens: int = 16_384
    rows: int = 64
    tiles: tuple[int, ...] = (2, 8, 16)

    def __post_init__(self) -> None:
        for name in ("slots", "tokens", "rows"):
            if getattr(self, name) < 1:
                raise UserError(name, getattr(self, name), "must be at least 1.")
        if not self.tiles or list(self.tiles) != sorted(set(self.tiles)) or self.tiles[0] < 1:
            raise UserError("tiles", self.tiles, "must be numbers from 1 in rising order.")
        if self.rows < self.slots:
            raise UserError("rows", self.rows, f"must be at least slots = {self.slots}.")


class Answer:
    """An answer under way.

    Attributes:
      sequence: its tokens.
      ids: of the prompt, which an encoder reads where there is one.
      sampling: how they are drawn.
      logprobs: of each of them, as of `programs.Drawn`.
    """

    def __init__(
        self, sequence: Sequence, ids: list[int], text: Detokenizer, sampling: SamplingConfig
    ):
        self.sequence = sequence
        self.ids = ids
        self.sampling = sampling
        self.logprobs: list[float] = []
        self._text = text

    @property
    def finished(self) -> bool:
        """Whether it has ended."""
        return self._text.finished

    def push(self, token: int, logprob: float) -> None:
        """Adds a token."""
        self.sequence.tokens.append(token)
        self.logprobs.append(logprob)
        self._text.push(token)

    def completion(self) -> Completion:
        """Returns the text so far."""
        return self._text.completion()


def _power_of_two(count: int, most: int) -> int:
    """Returns a count rounded up to a power of two, 64 or more, so that few widths are compiled."""
    width = 64
    while width < count:
        width *= 2
    return min(width, most)


class Engine:
    """Answers requests by steps, each over all running sequences.

    The host plans a step while the device runs the one before: it reads the tokens of a step when
    the next one is under way, and drops what was drawn after an end.

    Args:
      config: of the model.
      params: its parameters.
      tokenizer: the one it was trained with.
      serve: how it runs.
    """

    def __init__(self, config: ModelConfig, params: Any, tokenizer: Tokenizer, serve: ServeConfig):
        self._config = config
        self._params = params
        self._tokenizer = tokenizer
        self._serve = serve
        self._num_ids = min(tokenizer.vocab_size, config.vocab_size)

        # Page 0 is nobody's.
        num_pages = 1 + -(-serve.tokens // PAGE_SIZE)
        self._scheduler = Scheduler(serve.slots, PagePool(num_pages), PAGE_SIZE, serve.rows)
        pages_per_sequence = -(-config.max_length // PAGE_SIZE)
        self._table = np.zeros((serve.slots, pages_per_sequence), np.int32)
        self._num_pages = num_pages
        self._state = self._empty_state()
        self._tiles = self._warm_up()

        scalings = [config.position_of(layer).scaling for layer in config.layers()]
        self._by_length = any(scaling is not None and scaling.by_length for scaling in scalings)
        self._arrivals = itertools.count()
        self._answers: dict[Sequence, Answer] = {}
        self._in_slot: dict[int, Sequence] = {}
        # The rows of the step under way, and what is drawn from them.
        self._under_way: tuple[list[Row], Drawn] | None = None

    def submit(self, ids: Rows[int], sampling: SamplingConfig, *, priority: int = 0) -> Answer:
        """Queues a request.

        Args:
          ids: of the prompt.
          sampling: how the answer is drawn.
          priority: those of a higher one are served first.

        Raises:
          UserError: the prompt and its answer do not fit the model, or the pages.
        """
        tokens = list(ids)
        if self._config.structure == "encoder_decoder":
            check_room([ids], [0], self._config)
            tokens = [self._config.decoder_start_id]
        check_room([tokens], [sampling.max_tokens], self._config)
        limit = len(tokens) + sampling.max_tokens
        if limit > self._serve.tokens:
            raise UserError(
                "max_tokens",
                sampling.max_tokens,
                f"after a prompt of {len(tokens)} tokens is more than the engine's tokens = "
                f"{self._serve.tokens}.",
            )
        order = (-priority, next(self._arrivals))
        sequence = Sequence(order, tokens, limit, self._chain_start(limit))
        if self._config.structure == "prefix":
            sequence.in_one_piece = len(tokens)
        text = Detokenizer(self._tokenizer, ids, stop=sampling.stop, max_tokens=sampling.max_tokens)
        answer = Answer(sequence, list(ids), text, sampling)
        self._answers[sequence] = answer
        self._scheduler.add(sequence)
        return answer

    def _chain_start(self, limit: int) -> bytes | None:
        """Returns what the digests of a sequence's pages begin with; None where its keys are not
        those of its tokens alone, and so nobody else's.
        """
        if self._config.structure != "decoder":
            return None
        fields = {"version": b"0"}
        if self._by_length:
            fields["limit"] = str(limit).encode()
        return chain_start(fields)

    def abort(self, answer: Answer) -> None:
        """Ends a request, in whatever state it is: its pages are free for the next step."""
        self._scheduler.end(answer.sequence)
        self._answers.pop(answer.sequence, None)

    def run_step(self) -> bool:
        """Starts a step and reads the one before; returns whether there is more to do."""
        rows = self._scheduler.plan()
        started = self._start(rows) if rows else None
        if self._under_way is not None:
            self._read(*self._under_way)
        self._under_way = started
        return bool(self._answers)

    def _start(self, rows: list[Row]) -> tuple[list[Row], Drawn]:
        for sequence in {row.sequence for row in rows}:
            self._place(sequence)
        tile = next((tile for tile in self._tiles if len(rows) <= tile), self._tiles[-1])
        return rows, self._run(rows, tile, self._table)

    def _run(self, rows: Rows[Row], tile: int, table: np.ndarray) -> Drawn:
        """Starts the step of some rows; those of all but the largest tile fit in one."""
        width = tile
        if tile == self._serve.tiles[-1]:
            width = -(-self._serve.rows // tile) * tile
        slot = np.full(width, self._serve.slots, np.int32)
        position = np.zeros(width, np.int32)
        token = np.zeros(width, np.int32)
        draws = np.zeros(width, bool)
        for index, row in enumerate(rows):
            slot[index] = row.slot
            position[index] = row.position
            token[index] = -1 if row.token is None else row.token
            draws[index] = row.draws

        self._state, drawn = step(
            self._params,
            self._state,
            self._device_table(table),
            StepRows(*map(jnp.asarray, (slot, position, token, draws))),
            jnp.int32(-(-len(rows) // tile)),
            config=self._config,
            tile=tile,
            num_ids=self._num_ids,
        )
        return drawn

    def _warm_up(self) -> tuple[int, ...]:
        """Compiles the step of each tile, and returns the tiles that compute a row alike.

        Each writes the same tokens, and draws after each of them. How a machine multiplies a tile
        depends on its rows; only those tiles may take turns whose keys, values and log-
        probabilities are, bit for bit, those of the largest one.
        """
        count = min(self._serve.tiles[-1], self._serve.tokens, self._config.max_length)
        ids = [(1 + 7919 * index) % self._num_ids for index in range(count)]
        sequence = Sequence((0,), ids, count + 1)
        rows = [Row(sequence, 0, index, token, True) for index, token in enumerate(ids)]
        table = np.zeros_like(self._table)
        pages = -(-count // PAGE_SIZE)
        table[0, :pages] = np.arange(1, 1 + pages)

        found = {}
        for tile in self._serve.tiles:
            # Tokens and log-probabilities, then what the pages hold.
            results = []
            for start in range(0, count, tile):
                part = rows[start : start + tile]
                drawn = self._run(part, tile, table)
                results += [np.asarray(leaf)[: len(part)] for leaf in jax.tree.leaves(drawn)]
            by_row = np.concatenate(results[::2]), np.concatenate(results[1::2])
            written = [np.asarray(leaf) for leaf in jax.tree.leaves(self._state.layers)]
            found[tile] = [*by_row, *written]
            self._state = self._empty_state()
        expected = found[self._serve.tiles[-1]]
        alike = []
        for tile, arrays in found.items():
            pairs = zip(arrays, expected, strict=True)
            if all(left.tobytes() == right.tobytes() for left, right in pairs):
                alike.append(tile)
        return tuple(alike)

    def _place(self, sequence: Sequence) -> None:
        """Writes the pages of a sequence into the table, and a new one into its slot."""
        slot = sequence.slot
        assert slot is not None
        self._table[slot] = 0
        self._table[slot, : len(sequence.pages)] = sequence.pages
        if self._in_slot.get(slot) is sequence:
            return
        self._in_slot[slot] = sequence
        self._read_first(sequence, slot)
        sampling = self._answers[sequence].sampling
        seen = np.zeros(self._config.vocab_size, bool)
        seen[sequence.tokens] = True
        self._state = admit(
            self._state,
            jnp.int32(slot),
            keys_of([sampling.seed]),
            jnp.array([sequence.limit], jnp.int32),
            SamplingParams.of([sampling]),
            jnp.asarray(seen),
        )

    def _read_first(self, sequence: Sequence, slot: int) -> None:
        """Has read what is read in one piece: an encoder's tokens, or a prefix decoder's prompt."""
        structure = self._config.structure
        if structure == "decoder":
            return
        ids = self._answers[sequence].ids
        tokens = np.zeros((1, _power_of_two(len(ids), self._config.max_length)), np.int32)
        tokens[0, : len(ids)] = ids
        read = (jnp.asarray(tokens), jnp.array([len(ids)], jnp.int32))
        model = {"config": self._config}
        if structure == "prefix":
            table = self._device_table(self._table[slot : slot + 1])
            self._state = read_prefix(self._params, self._state, table, *read, **model)
            return
        self._state = read_source(self._params, self._state, jnp.int32(slot), *read, **model)

    def _device_table(self, ids: np.ndarray) -> PageTable:
        # A copy: the host changes its own while the device reads.
        return PageTable(jnp.array(ids), self._num_pages, PAGE_SIZE)

    def _empty_state(self) -> DeviceState:
        count = self._serve.slots
        length = self._config.max_length
        segments = None
        if self._config.structure == "encoder_decoder":
            segments = jnp.zeros((count, length), jnp.int32)
        model = language_model(self._config)
        table = self._device_table(self._table)
        cache = model.empty_cache(self._params, count, length, segments, page_table=table)
        return DeviceState(cache.layers, empty_slots(count, self._config.vocab_size), segments)

    def _read(self, rows: list[Row], drawn: Drawn) -> None:
        """Reads what a step drew, and ends the answers that are finished."""
        tokens = np.asarray(drawn.token).tolist()
        logprobs = np.asarray(drawn.logprob).tolist()
        for index, row in enumerate(rows):
            answer = self._answers.get(row.sequence)
            if not row.draws or answer is None:
                continue
            answer.push(tokens[index], logprobs[index])
            if answer.finished:
                self.abort(answer)
