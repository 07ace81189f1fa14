"""An answer under way as the scheduler knows it: a sequence, and the rows that steps take of it."""

import dataclasses
from collections.abc import Iterable

from research.inference.pages import chain


@dataclasses.dataclass(eq=False)
class Sequence:
    """An answer under way.

    Attributes:
      order: of service: the least is served first, and loses its pages last.
      tokens: those that the host knows, the prompt first.
      limit: tokens at most, the prompt's included.
      chain_start: digest that its pages' digests begin with; None where its pages are not shared.
      in_one_piece: tokens of a prompt that is read before its first step, all of it at once; 0 for
        none.
      leader: another answer to the same prompt, whose pages of it are shared: it is admitted after
        those are written.
      reads_all: whether its prompt is read even where there are pages of it.
      needs_host: whether what is drawn next depends on what the host makes of the newest token: a
        grammar's mask, or drafts.
      is_urgent: whether it takes the slot of one that is served later: others of its request wait
        for it in theirs.
      reads_piece: whether it was admitted with that prompt to be read.
      drafts: guesses of the tokens after the newest one, which the next step reads too; None for
        one that only the device knows.
      length: tokens that exist, with those that the device draws and the host has not read.
      written: tokens whose keys and values are in the pages, or are written by steps under way.
      named: full pages of which the pools know what they hold.
      slot: its row of the device's state; None while it waits.
      pages: of its tokens, of each kind of layers.
      paused: whether it takes no step until tokens are added.
      ended: whether nothing more is wanted of it.
    """

    order: tuple[int, ...]
    tokens: list[int]
    limit: int
    chain_start: bytes | None = None
    in_one_piece: int = 0
    leader: "Sequence | None" = None
    reads_all: bool = False
    needs_host: bool = False
    is_urgent: bool = False
    drafts: tuple[int | None, ...] = ()
    reads_piece: bool = False
    length: int = 0
    written: int = 0
    named: int = 0
    slot: int | None = None
    pages: tuple[list[int], ...] = ()
    paused: bool = False
    ended: bool = False
    _digests: list[bytes] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.length = len(self.tokens)

    @property
    def missing(self) -> int:
        """Tokens that exist and can be written; the last one allowed never is."""
        if self.paused:
            return 0
        length = len(self.tokens) if self.needs_host else self.length
        return min(length, self.limit - 1) - self.written

    @property
    def is_answering(self) -> bool:
        """Whether only its newest token, which the host knows, is not written."""
        return self.is_known and self.written == self.length - 1

    @property
    def is_known(self) -> bool:
        """Whether the host knows all of its tokens."""
        return self.length == len(self.tokens)

    def token_at(self, position: int) -> int | None:
        """Returns a token or a draft; None where only the device knows it."""
        known = len(self.tokens)
        if position < known:
            return self.tokens[position]
        draft = position - known
        return self.drafts[draft] if draft < len(self.drafts) else None

    def pause(self) -> None:
        """Takes no step until tokens are added: others must be known first."""
        self.paused = True
        self.length = len(self.tokens)

    def add(self, tokens: Iterable[int]) -> None:
        """Adds what was drawn by the newest step."""
        self.paused = False
        self.tokens += tokens
        if self.needs_host:
            # No other step is under way. Drafts that were wrong are written, and do not count.
            self.length = len(self.tokens)
            self.written = min(self.written, self.length - 1)
            self.drafts = ()

    def rename(self, chain_start: bytes | None) -> None:
        """Begins the digests of its pages anew: what decides its keys has changed."""
        self.chain_start = chain_start
        self._digests = []

    def digests(self, page_size: int) -> list[bytes]:
        """Returns the digests of the full pages of its known tokens."""
        assert self.chain_start is not None
        # Those of earlier calls, and of pages that were filled since.
        done = len(self._digests)
        parent = self._digests[-1] if done else self.chain_start
        self._digests += chain(parent, self.tokens[done * page_size :], page_size)
        return self._digests


@dataclasses.dataclass(frozen=True)
class Row:
    """A token that a step writes.

    Attributes:
      sequence: whose.
      slot: of the sequence in this step.
      position: of the token.
      token: its id; None where only the device knows it, as it was drawn by the step before.
      draws: whether the next token is drawn from it.
      draft: which of the sequence's drafts it is, from 1; 0 for none.
    """

    sequence: Sequence
    slot: int
    position: int
    token: int | None
    draws: bool
    draft: int = 0
