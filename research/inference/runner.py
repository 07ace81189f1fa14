"""The device side of an engine: parameters, pages and slots, and the programs that change them."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, UInt32

from research.core.errors import UserError
from research.inference.drawing import Allowed, draw_step
from research.inference.page_tables import PageTables, Tables
from research.inference.placement import id_rules, one_slot, windows_of
from research.inference.pool_sizes import pool_pages
from research.inference.program_names import draft_tiles, piece_widths, step_tiles
from research.inference.programs import copy_pages, empty_state, read, read_prefix, read_source
from research.inference.sampling_config import SamplingConfig
from research.inference.scheduler import PageCopy
from research.inference.sequence import Row
from research.inference.sequence import Sequence as Answered
from research.inference.serve_config import ServeConfig
from research.inference.slots import (
    Drawn,
    LogprobKind,
    Slots,
    StepRows,
    admit,
    empty_slots,
)
from research.inference.speculation.drafter import Drafter
from research.inference.speculation.propose import DraftRows, propose
from research.inference.tile_probe import alike_tiles
from research.models.language_model import LanguageModelConfig, compute_dtype
from research.models.paged_cache import stack_axes
from research.parallel.mesh import on_mesh
from research.parallel.target import platform

logger = logging.getLogger("tessera")


class Runner:
    """What an engine keeps on its devices.

    Attributes:
      params: of the model.
      state: pages, and what the programs hand to each other.
      windows: of the kinds of layers, as of `windows_of`.
      num_pages: of each kind, page 0 included.
      pages_per_sequence: entries of a table's row.
      tables: the pages of each slot, of each kind.

    Args:
      config: of the model.
      params: its parameters.
      serve: how it runs.
      num_ids: only ids below it are drawn.
      mesh: that the parameters are sharded over; None is one device.
      drafter: who guesses on the device; None for nobody.
      draft_params: the drafter's own.
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        params: Any,
        serve: ServeConfig,
        num_ids: int,
        mesh: Mesh | None,
        drafter: Drafter | None,
        draft_params: Any,
    ):
        self.params = params
        self._drafter = drafter
        self._draft_params = draft_params
        keeps_all = drafter is not None and drafter.has_layers
        self.windows = windows_of(config, keeps_all=keeps_all)
        self.num_pages = pool_pages(serve, self.windows, config.max_length)
        self.pages_per_sequence = serve.pages_of(config.max_length)
        self.tables = PageTables(
            serve.slots, self.pages_per_sequence, self.num_pages, serve.page_size
        )
        self._config = config
        self._serve = serve
        self._num_ids = num_ids
        self.mesh = mesh
        self._tiles = step_tiles(config, serve)
        self._draft_tiles = draft_tiles(self._tiles, serve)
        self._widths = piece_widths(config.max_length, len(self._tiles))
        self._width = serve.padded_rows()
        self._set_empty()
        shape = self._slots.rules.allowed.shape
        # By way of NumPy and on no device of a mesh, as later ones: that is a program too.
        nothing = jnp.asarray(np.full(shape[0], shape[0], np.int32))
        self._nothing_new = Allowed(nothing, jnp.asarray(np.zeros(shape, np.uint32)))
        self._tiles = self._warm_up()

    def _set_empty(self) -> None:
        """Makes empty pages and slots."""
        serve = self._serve
        cache_dtype = None if serve.cache_dtype == "auto" else serve.cache_dtype
        with on_mesh(self.mesh):
            self.state = empty_state(
                self.params,
                self._draft_params,
                self.tables.on_device(self.tables.ids),
                config=self._config,
                rows=self._width,
                drafter=self._drafter,
                cache_dtype=cache_dtype,
            )
            self._slots = empty_slots(serve.slots, self._num_ids, serve.drafts)
        if self.mesh is None:
            arrays = (self.state, self._slots)
            self.state, self._slots = _committed_as(self.params, arrays)

    def recover(self) -> None:
        """Makes pages and slots anew where a step that was broken off took them."""
        leaves = jax.tree.leaves((self.state, self._slots))
        if any(leaf.is_deleted() for leaf in leaves):
            self._set_empty()

    def place(self, slot: int, sequence: Slots) -> None:
        """Puts a sequence into a slot."""
        with on_mesh(self.mesh):
            self._slots = admit(self._slots, jnp.int32(slot), sequence)

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """Copies pages of each kind."""
        if not copies:
            return
        # Page 0, which nobody reads, is copied to itself where there are fewer than slots.
        # [copies, kinds, 2] -> [2, kinds, slots]
        pairs = np.zeros((2, len(self.windows), self._serve.slots), np.int32)
        pairs[..., : len(copies)] = np.transpose(copies)
        with on_mesh(self.mesh):
            sources, targets = map(jnp.asarray, pairs)
            self.state = copy_pages(self.state, sources, targets)

    def read_source(self, row: int, ids: Sequence[int]) -> None:
        """Has the encoder read tokens into a row of the memory."""
        with on_mesh(self.mesh):
            self.state = read_source(
                self.params, self.state, jnp.int32(row), *self._piece(ids), config=self._config
            )

    def read_prefix(self, slot: int, ids: Sequence[int]) -> None:
        """Reads a prompt whose tokens attend to all of it into the pages of a slot."""
        table = self.tables.of_slot(slot)
        with on_mesh(self.mesh):
            self.state = read_prefix(
                self.params, self.state, table, *self._piece(ids), config=self._config
            )

    def _piece(self, ids: Sequence[int]) -> tuple[Int[jax.Array, "1 T"], Int[jax.Array, "1"]]:
        width = next(width for width in self._widths if len(ids) <= width)
        # Padding is a token that is there anyway: another one's values might be no numbers.
        tokens = np.full((1, width), ids[-1], np.int32)
        tokens[0, : len(ids)] = ids
        return jnp.asarray(tokens), jnp.array([len(ids)], jnp.int32)

    def read(
        self, rows: Sequence[Row], targets: Mapping[int, int], wants: set[int]
    ) -> tuple[StepRows, list[int]]:
        """Starts to read the tokens of a step.

        Args:
          rows: of it.
          targets: the token whose log-probability is wanted, by index of the row.
          wants: indices of rows whose likeliest and kept ids are wanted.

        Returns:
          the rows, and the indices of those that draw or have a target.
        """
        tile = next((tile for tile in self._tiles if len(rows) <= tile), self._tiles[-1])
        arrays = self._rows(rows, targets, wants)
        self._read(arrays, len(rows), tile, self.tables.ids)
        drawing = {index for index, row in enumerate(rows) if row.draws}
        needed = sorted(drawing | set(targets))
        return arrays, needed

    def propose(self, rows: Sequence[tuple[int, int, int]]) -> None:
        """Has guesses made on the device.

        Args:
          rows: the slot of each answer, the position of its newest token, and the row of the newest
            step that this was drawn from.
        """
        tiles = self._draft_tiles
        tile = next((tile for tile in tiles if len(rows) <= tile), tiles[-1])
        arrays = np.zeros((3, self._width), np.int32)
        arrays[0] = self._serve.slots
        arrays[:, : len(rows)] = np.transpose(rows)
        count = jnp.int32(-(-len(rows) // tile))
        with on_mesh(self.mesh):
            self.state, self._slots = propose(
                self.params,
                self._draft_params,
                self.state,
                self._slots,
                self.tables.on_device(self.tables.ids),
                DraftRows(*map(jnp.asarray, arrays)),
                count,
                drafter=self._drafter,
                tile=tile,
            )

    def draw(
        self,
        step: tuple[StepRows, list[int]],
        masks: Mapping[int, UInt32[np.ndarray, "drafts words"]],
    ) -> tuple[Drawn, Int[jax.Array, "slots"]]:
        """Starts to draw from a step that is being read.

        Args:
          step: from `read`.
          masks: which ids may be drawn next, after the newest token and after each draft, of slots
            where that has changed.
        """
        return self._draw(*step, self._allowed(masks))

    def _read(self, rows: StepRows, count: int, tile: int, tables: Tables) -> None:
        with on_mesh(self.mesh):
            self.state = read(
                self.params,
                self._draft_params,
                self.state,
                self._slots,
                self.tables.on_device(tables),
                rows,
                jnp.int32(-(-count // tile)),
                config=self._config,
                tile=tile,
                drafter=self._drafter,
            )

    def _draw(
        self, rows: StepRows, needed: Sequence[int], allowed: Allowed
    ) -> tuple[Drawn, Int[jax.Array, "slots"]]:
        width = self._width
        order = np.full(width, width, np.int32)
        order[: len(needed)] = needed
        # On CPU few rows draw, and those that do not cost nothing.
        group = 1 if platform() == "cpu" else width
        with on_mesh(self.mesh):
            self._slots, drawn, accepted = draw_step(
                self._slots,
                rows,
                self.state.logits,
                jnp.asarray(order),
                jnp.int32(len(needed)),
                allowed,
                group=group,
                num_top=min(self._serve.top_logprobs, self._config.vocab_size),
            )
        return drawn, accepted

    def _rows(
        self, rows: Sequence[Row | None], targets: Mapping[int, int], wants: set[int]
    ) -> StepRows:
        width = self._width
        arrays = {
            "slot": np.full(width, self._serve.slots, np.int32),
            "position": np.zeros(width, np.int32),
            "token": np.zeros(width, np.int32),
            "draft": np.zeros(width, np.int32),
            "draws": np.zeros(width, bool),
            "target": np.full(width, -1, np.int32),
            "following": np.full(width, -1, np.int32),
            "wants": np.zeros(width, bool),
        }
        for index, row in enumerate(rows):
            if row is None:
                continue
            arrays["slot"][index] = row.slot
            arrays["position"][index] = row.position
            arrays["token"][index] = -1 if row.token is None else row.token
            arrays["draft"][index] = row.draft
            arrays["draws"][index] = row.draws
            arrays["target"][index] = targets.get(index, -1)
            arrays["following"][index] = _following(row)
            arrays["wants"][index] = index in wants
        return StepRows(**{name: jnp.asarray(array) for name, array in arrays.items()})

    def _allowed(self, masks: Mapping[int, UInt32[np.ndarray, "drafts words"]]) -> Allowed:
        if not masks:
            return self._nothing_new
        shape = self._slots.rules.allowed.shape
        slots = np.full(shape[0], shape[0], np.int32)
        words = np.zeros(shape, np.uint32)
        for index, (slot, mask) in enumerate(masks.items()):
            slots[index] = slot
            words[index, : len(mask)] = mask
        return Allowed(jnp.asarray(slots), jnp.asarray(words))

    def _warm_up(self) -> tuple[int, ...]:
        """Compiles all programs, and returns the tiles that compute a row alike: those that may
        take turns.
        """
        for width in self._widths:
            if self._config.structure == "encoder_decoder":
                self.read_source(0, [0] * width)
            if self._config.structure == "prefix":
                self.read_prefix(0, [0] * width)

        self.copy_pages([((0, 0),) * len(self.windows)])
        if self._drafter is not None:
            for tile in self._draft_tiles:
                self.propose([(self._serve.slots, 1, 0)] * tile)

        # Without the promise they are only compiled.
        is_narrow = self._serve.invariant and compute_dtype(self._config).itemsize < 4
        alike = alike_tiles(self._tiles, self._probe, is_narrow=is_narrow)
        if not self._serve.invariant:
            return self._tiles
        if not alike:
            raise UserError(
                "invariant",
                True,
                "cannot be kept on this machine: a row's bits depend on its tile.",
            )
        left_out = [tile for tile in self._tiles if tile not in alike]
        if left_out:
            largest = self._tiles[-1]
            logger.info("tiles %s compute otherwise here than %d; left out", left_out, largest)
        return alike

    def _probe(self, draw: int, tile: int, skipped: int) -> list[bytes]:
        """Returns all that steps of one tile compute of some tokens: log-probabilities, and pages.

        Args:
          draw: which tokens.
          tile: rows of a tile.
          skipped: rows of the first tile that are padding.
        """
        room = (min(self.num_pages) - 1) * self._serve.page_size
        count = min(self._tiles[-1], room, self._config.max_length)
        first = 1 + draw * count
        ids = [7919 * index % self._num_ids for index in range(first, first + count)]
        sequence = Answered((0,), ids, count + 1)
        sampling = SamplingConfig(temperature=0.0, max_tokens=1)
        rules = id_rules(sequence, count, sampling, (), self._num_ids)
        drafts = self._serve.drafts
        self.place(0, one_slot(sequence, sampling, 0, 0, LogprobKind.RAW, rules, drafts))

        pages = self._serve.pages_of(count)
        tables = [np.zeros_like(table) for table in self.tables.ids]
        for table in tables:
            table[0, :pages] = np.arange(1, 1 + pages)
        rows = [Row(sequence, 0, index, token, True) for index, token in enumerate(ids)]
        padded = [*[None] * skipped, *rows]
        logprobs = []
        for start in range(0, len(padded), tile):
            part = padded[start : start + tile]
            needed = [index for index, row in enumerate(part) if row is not None]
            arrays = self._rows(part, {}, set())
            self._read(arrays, tile, tile, tables)
            drawn, _ = self._draw(arrays, needed, self._nothing_new)
            logprob = np.asarray(drawn.logprob)
            logprobs.append(logprob[needed])
        written = []
        for layer in self.state.layers:
            # Page 0, where padding is written, is not compared: [*L, pages, …].
            axis = stack_axes(layer.tokens.pages)
            for leaf in layer.tokens.pages.arrays():
                own = jax.lax.slice_in_dim(leaf, 1, 1 + pages, axis=axis)
                written.append(np.asarray(own))
        found = [np.concatenate(logprobs), *written]
        return [array.tobytes() for array in found]


def _committed_as(params: Any, tree: Any) -> Any:
    """Returns arrays on the device of the parameters where these were put on one, as those of a
    checkpoint are: so steps return them, and arrays that were put nowhere make other programs.
    """
    first, *_ = jax.tree.leaves(params)
    if not isinstance(first, jax.Array) or not first.committed:
        return tree
    return jax.device_put(tree, first.sharding)


def _following(row: Row) -> int:
    """Returns the token after a row's, -2 for a draft that the device made, else -1."""
    token = row.sequence.token_at(row.position + 1)
    if token is not None:
        return token
    return -2 if row.draft < len(row.sequence.drafts) and row.draws else -1
