"""A cache of keys and values in pages: a page holds some consecutive tokens of one sequence,
wherever it lies.

Which page holds which tokens is said by a table, `[B, pages_per_sequence]`: token t of sequence b
stands in page `table[b, t // C]`, slot `t % C`, with C the slots of a page. Who owns which page is
its owner's business.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from research.core.errors import UserError
from research.core.trees import node

# The largest magnitude of the types that are kept with scales.
QUANTIZED = {"int8": 127.0, "float8_e4m3fn": 448.0}
PLAIN = ("bfloat16", "float16", "float32")


@node(static=())
@dataclasses.dataclass(frozen=True)
class KVPages:
    """Keys and values of one layer, P pages of C slots.

    The heads stand before the slots: all of a page is one piece of memory, which a TPU copies at a
    time, and so is all of a head in it, which a GPU copies at a time and every matmul takes as it
    lies.

    Attributes:
      key, value: bfloat16, float16 or float32, or int8 or float8_e4m3fn with scales.
      key_scale, value_scale: of each token and head, what its int8 or float8 numbers are multiplied
        with; None where they are not quantized.
    """

    key: Shaped[Array, "P K C H"]
    value: Shaped[Array, "P K C H"]
    key_scale: Float[Array, "P K C"] | None = None
    value_scale: Float[Array, "P K C"] | None = None

    @property
    def page_size(self) -> int:
        """C, the tokens that a page holds."""
        return self.key.shape[2]

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.key.shape[1]

    @property
    def head_dim(self) -> int:
        """H, of the pages: narrower heads end in zeros."""
        return self.key.shape[3]

    @property
    def quantized(self) -> bool:
        """Whether there are scales."""
        return self.key_scale is not None


def empty_pages(
    pages: int, page_size: int, kv_heads: int, head_dim: int, dtype: str = "bfloat16"
) -> KVPages:
    """Returns pages of zeros.

    Args:
      pages: P.
      page_size: C, tokens a page.
      kv_heads: K.
      head_dim: H; that of the model or above, where an implementation needs it.
      dtype: `bfloat16`, `float16`, `float32`, `int8` or `float8_e4m3fn`.

    Raises:
      UserError: another type.
    """
    if dtype not in (*PLAIN, *QUANTIZED):
        raise UserError("dtype", dtype, f"is not one of {', '.join((*PLAIN, *QUANTIZED))}.")
    shape = (pages, kv_heads, page_size, head_dim)
    key, value = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
    if dtype in PLAIN:
        return KVPages(key, value)
    return KVPages(key, value, jnp.zeros(shape[:3], jnp.float32), jnp.zeros(shape[:3], jnp.float32))


def quantize(
    x: Float[Array, "*tokens H"], dtype: str
) -> tuple[Shaped[Array, "*tokens H"], Float[Array, "*tokens"]]:
    """Returns numbers and scales, x ≈ numbers · scale with scale = max |x| / m and m the largest
    number of the type.

    Args:
      x: a token and head a row.
      dtype: of `QUANTIZED`. The error is at most scale / 2 in int8, and in float8_e4m3fn at most
        |x| / 16, or half of the type's smallest step, scale / 1024.
    """
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / QUANTIZED[dtype]
    numbers = x / jnp.where(scale > 0, scale, 1.0)[..., None]
    return (jnp.round(numbers) if dtype == "int8" else numbers).astype(dtype), scale


def write(
    pages: KVPages,
    table: Int[Array, "B pages_per_sequence"],
    lengths: Int[Array, "B"],
    key: Float[Array, "B R K H"],
    value: Float[Array, "B R K H"],
) -> KVPages:
    """Returns the pages with R new tokens appended to each sequence, quantized where the pages are.

    Args:
      pages: donate them to a compiled caller, and nothing else is copied.
      table: page of each `page_size` tokens. A token whose page id is not in 0 to P - 1, or that
          lies past the table,
        is written nowhere: -1 marks sequences that stand still.
      lengths: tokens that each sequence holds so far.
      key, value: the new tokens; zeros are added where the pages are wider.
    """
    count, _, size, width = pages.key.shape
    key, value = (
        jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[3]))) for x in (key, value)
    )
    positions = lengths[:, None] + jnp.arange(key.shape[1])[None]
    places = positions // size
    ids = jnp.take_along_axis(table, jnp.minimum(places, table.shape[1] - 1), axis=1)
    # An index out of range is dropped, but a negative one would count from the end.
    ids = jnp.where((places < table.shape[1]) & (ids >= 0), ids, count)
    slots = positions % size

    def put(old: Array, new: Array) -> Array:
        return old.at[ids, :, slots].set(new.astype(old.dtype), mode="drop")

    if not pages.quantized:
        return KVPages(put(pages.key, key), put(pages.value, value))
    (key, key_scale), (value, value_scale) = (
        quantize(x, pages.key.dtype.name) for x in (key, value)
    )
    return KVPages(
        put(pages.key, key),
        put(pages.value, value),
        put(pages.key_scale, key_scale),
        put(pages.value_scale, value_scale),
    )


def gather(
    pages: KVPages, table: Int[Array, "B pages_per_sequence"]
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Returns the keys and values of each sequence one after the other, in float32 where they are
    quantized.

    Args:
      pages: all pages.
      table: ids out of range, as may stand past a sequence's end, read some page.
    """

    def dense(x: Array, scale: Array | None) -> Array:
        found = x.at[table].get(mode="clip")
        if scale is not None:
            found = found.astype(jnp.float32) * scale.at[table].get(mode="clip")[..., None]
        batch, places, heads, size, width = found.shape
        return jnp.swapaxes(found, 2, 3).reshape(batch, places * size, heads, width)

    return dense(pages.key, pages.key_scale), dense(pages.value, pages.value_scale)


def needed(
    lengths: Int[Array, "B"], rows: int, page_size: int, window: int | None
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Returns of each sequence the first place in the table that its rows look at, and the one past
    the last.

    Args:
      lengths: tokens of each sequence.
      rows: R, its newest tokens, which are the queries.
      page_size: C.
      window: of the attention, or None.
    """
    end = jax.lax.div(lengths + page_size - 1, page_size)
    if window is None:
        return jnp.zeros_like(end), end
    oldest = jnp.maximum(lengths - rows - window + 1, 0)
    return jnp.minimum(jax.lax.div(oldest, page_size), end), end
