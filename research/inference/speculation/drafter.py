"""What guesses on the device: the interface of its kinds."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from research.models.cache import LayerCache
from research.models.paged_cache import PageTable

Layers = tuple[LayerCache, ...]


class Pages(NamedTuple):
    """The pages that a drafter reads and writes.

    Attributes:
      target: those of the model that answers.
      own: further ones, of the same tokens in the same places.
      table: the pages of each row.
    """

    target: Layers
    own: Layers
    table: PageTable


class Tokens(NamedTuple):
    """Tokens that are read, one a row.

    Attributes:
      ids: of the tokens.
      positions: of the tokens.
      limits: of their sequences, as of `Slots.limit`.
      hidden: states after the tokens before them.
    """

    ids: Int[Array, "B"]
    positions: Int[Array, "B"]
    limits: Int[Array, "B"]
    hidden: Float[Array, "B D"]


@runtime_checkable
class Drafter(Protocol):
    """A kind of guesses: hashable, and equal where its fields are.

    Attributes:
      has_layers: whether it has pages of its own.
    """

    has_layers: bool

    def empty_layers(self, draft_params: Any, table: PageTable) -> Layers:
        """Returns pages of its own, without tokens."""
        ...

    def fill(
        self,
        params: Any,
        draft_params: Any,
        pages: Pages,
        tokens: Tokens,
        following: Int[Array, "B"],
    ) -> Layers:
        """Returns its own pages with tokens in them that the model has read.

        Args:
          params: of the model that answers.
          draft_params: its own.
          pages: before.
          tokens: with the states after these tokens.
          following: the token after each; below 0 where it is not known.
        """
        ...

    def step(
        self, params: Any, draft_params: Any, pages: Pages, tokens: Tokens
    ) -> tuple[Float[Array, "B V"], Float[Array, "B D"], Pages]:
        """Returns the logits after tokens, the states after them, and the pages with them."""
        ...
