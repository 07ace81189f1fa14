"""How an engine runs."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from research.core import config as configs
from research.core.errors import UserError
from research.kernels.decode_attention import PAGE_SIZE

# Tiles that steps are compiled for, at most.
MOST_TILES = 4
# Who guesses without a model.
ON_HOST = ("none", "lookup")
# Where guesses are made and nothing is said of their number: each takes a run of a model.
USUAL_DRAFTS = 4
# Those of look-up take none. With the newest token they fill a tile of 8 rows, which takes as long
# with fewer.
USUAL_LOOKUP_DRAFTS = 7
# The numbers, and the least of each; what is counted in a step is an int32.
LEAST = {
    "slots": 1,
    "tokens": 0,
    "rows": 1,
    "page_size": 1,
    "drafts": 0,
    "draft_layers": 0,
    "top_logprobs": 0,
}
MOST = 2**31 - 1
# What decides which tokens and log-probabilities an answer has; the rest decides when it comes.
ANSWER_FIELDS = ("invariant", "cache_dtype", "page_size", "top_logprobs")


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """How an engine runs.

    Attributes:
      slots: sequences that run at a time, at most.
      tokens: of all sequences that the cache holds, at most; 0 for those that fit in `memory`.
      memory: the share of what a device has beside the parameters that the engine may take, where
        `tokens` is 0.
      rows: tokens of a step, at most: those of prompts beside one of each running sequence.
      tiles: rows that a compiled step takes at a time, in rising order. With fewer rows than the
        largest tile, a step takes the smallest tile that they fit in.
      invariant: whether an answer is, bit for bit, a function of its request alone. Else a step
        takes all its rows at once, or one alone.
      cache_dtype: of keys and values in pages: `auto` is the type of the model's activations;
        `int8` and `float8_e4m3fn` have a scale for each token and head.
      page_size: tokens of a page of the cache. Prompts share full pages.
      prefix_cache: whether prompts share the pages of what they begin with; None says that they
        do in decoders, whose keys depend on nothing else.
      transfers: whether pages may leave the engine and come to it, by two more programs.
      drafts: guessed tokens that an answer may have in a step, at most; 0 for none.
      speculate: who guesses: `none`; `lookup` takes what followed in the text before;
        `first_layers` of the model; a `draft` model; `mtp` is its own multi-token prediction.
      draft_layers: how many first layers guess.
      top_logprobs: of a token, at most.
      debug_nans: whether a text whose logits are no numbers is read again, to name the first such
        value of a layer in the error of its request; the others wait for it.
    """

    slots: int = 16
    tokens: int = 0
    memory: float = 0.8
    rows: int = 64
    tiles: tuple[int, ...] = (2, 8, 16)
    invariant: bool = True
    cache_dtype: Literal["auto", "float32", "bfloat16", "int8", "float8_e4m3fn"] = "auto"
    page_size: int = PAGE_SIZE
    prefix_cache: bool | None = None
    transfers: bool = False
    drafts: int = 0
    speculate: Literal["none", "lookup", "first_layers", "draft", "mtp"] = "none"
    draft_layers: int = 0
    top_logprobs: int = 20
    debug_nans: bool = False

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            if not least <= getattr(self, name) <= MOST:
                raise UserError(name, getattr(self, name), f"must lie in [{least}, {MOST}].")
        if not self.tiles or list(self.tiles) != sorted(set(self.tiles)) or self.tiles[0] < 1:
            raise UserError("tiles", self.tiles, "must be numbers from 1 in rising order.")
        count = len(self.row_tiles())
        most = self.most_tiles()
        if count > most:
            beside = ", as transfers are programs too" if most < MOST_TILES else ""
            rule = f"are {count} programs to compile, and there may be {most}{beside}."
            raise UserError("tiles", self.tiles, rule)
        if not 0 < self.memory <= 1:
            raise UserError("memory", self.memory, "must lie in (0, 1].")
        if self.speculate != "none" and not self.drafts:
            raise UserError("speculate", self.speculate, "needs drafts above 0.")
        least = self.slots * (1 + self.drafts)
        if self.rows < least:
            raise UserError("rows", self.rows, f"must be at least slots · (1 + drafts) = {least}.")

    def of_structure(self, structure: str) -> "ServeConfig":
        """Returns how an engine of a model's structure runs.

        Args:
          structure: as of `ModelConfig`.

        Raises:
          UserError: prompts shall share pages, and do not in this structure; or pages that nobody
            shares shall leave.
        """
        if self.prefix_cache and structure != "decoder":
            raise UserError(
                "prefix_cache", True, f"is for decoders, not for a model of {structure!r}."
            )
        shares = structure == "decoder" and self.prefix_cache is not False
        if self.transfers and not shares:
            raise UserError("transfers", True, "is for decoders whose prompts share pages.")
        return dataclasses.replace(self, prefix_cache=shares)

    def pages_of(self, tokens: int) -> int:
        """Returns how many pages hold tokens."""
        return -(-tokens // self.page_size)

    def row_tiles(self) -> tuple[int, ...]:
        """Returns the tiles that steps are compiled for."""
        if self.invariant:
            return self.tiles
        # A row alone is read at the rate of memory, two of them are not; the last tile takes all
        # rows at once: tiles (2, 8, 16), 64 rows -> (1, 8, 16, 64)
        smaller = [tile for tile in (1, *self.tiles[1:]) if tile < self.rows]
        return (*smaller, self.rows)

    @property
    def guesses_on_device(self) -> bool:
        """Whether a model guesses."""
        return self.speculate not in ON_HOST

    def most_tiles(self) -> int:
        """Returns how many tiles steps may be compiled for, beside all other programs."""
        # Of the two that move pages one takes a tile's place, and both do where a model guesses.
        taken = self.transfers * (1 + self.guesses_on_device)
        return MOST_TILES - taken

    def padded_rows(self) -> int:
        """Returns the rows of a step's arrays: whole tiles of the largest size."""
        tile = self.row_tiles()[-1]
        # Two at least: of an array of one tile the compiler takes no slice, fuses what is left with
        # what reads it, and so computes a row otherwise than where there are more.
        least = 2 if self.invariant else 1
        return max(least, -(-self.rows // tile)) * tile


def bind_serve(fields: Mapping[str, Any]) -> ServeConfig:
    """Returns how an engine runs by some of its fields: where they say nothing of it, there are
    drafts if guesses are made, rows for all slots, and as many tiles as programs leave room for.

    Raises:
      UserError: a field that is not known or out of range.
    """
    values = dict(fields)
    usual = ServeConfig()
    speculate = values.get("speculate", usual.speculate)
    if "drafts" not in values and speculate == "lookup":
        values["drafts"] = USUAL_LOOKUP_DRAFTS
    elif "drafts" not in values and speculate != "none":
        values["drafts"] = USUAL_DRAFTS
    slots = values.get("slots", usual.slots)
    drafts = values.get("drafts", usual.drafts)
    transfers = values.get("transfers", usual.transfers)
    if "tiles" not in values and transfers and speculate not in ON_HOST:
        # Two, as transfers are programs too.
        values["tiles"] = (usual.tiles[0], usual.tiles[-1])
    # What is no number is refused where it is bound.
    if "rows" not in values and isinstance(slots, int) and isinstance(drafts, int):
        values["rows"] = max(usual.rows, slots * (1 + drafts))
    return configs.bind(ServeConfig, values)
