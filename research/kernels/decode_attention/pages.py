"""A cache of keys and values in pages: a page holds some consecutive tokens of one sequence.

A table `[B, pages_per_sequence]` holds page ids: token t of sequence b is in page
`table[b, t // page_size]`, slot `t % page_size`. Who allocates pages is not decided here.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from research.core.errors import UserError
from research.core.trees import node
from research.parallel.mesh_axes import TENSOR_AXIS
from research.parallel.shard_map import shard_map, sharding_axes

# The largest magnitude of the types that are kept with scales.
QUANTIZED = {"int8": 127.0, "float8_e4m3fn": 448.0}
PLAIN = ("bfloat16", "float16", "float32")
# Types that XLA for CPU widens all of an array of where some of it is written, and the unsigned
# integers as wide.
BITS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8"}


@node(static=("bits_of",))
@dataclasses.dataclass(frozen=True)
class KVPages:
    """Keys and values of one layer in pages, each of `page_size` slots.

    Heads come before slots: all of a page is contiguous in memory, which a TPU copies at a time.
    So is each of its heads, which a GPU copies at a time and which a matmul takes as it is.

    Attributes:
      key, value: bfloat16, float16 or float32, or int8 or float8_e4m3fn with scales.
      key_scale, value_scale: of each token and head, what its int8 or float8 numbers are multiplied
        with; None where they are not quantized.
      bits_of: the type of the numbers where `key` and `value` hold their bits as unsigned integers;
        None where they hold the numbers.
    """

    key: Shaped[Array, "pages K slots H"]
    value: Shaped[Array, "pages K slots value"]
    key_scale: Float[Array, "pages K slots"] | None = None
    value_scale: Float[Array, "pages K slots"] | None = None
    bits_of: str | None = None

    @property
    def dtype(self) -> jnp.dtype:
        """The type of the numbers."""
        return jnp.dtype(self.bits_of or self.key.dtype)

    @property
    def page_size(self) -> int:
        """The tokens that a page holds."""
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

    def arrays(self) -> list[Shaped[Array, "..."]]:
        """Returns keys, values, and their scales if there are any."""
        optional = (self.key, self.value, self.key_scale, self.value_scale)
        return [x for x in optional if x is not None]

    def numbers(self, stored: Shaped[Array, "*any"]) -> Shaped[Array, "*any"]:
        """Returns the numbers of a part of `key` or `value`."""
        if self.bits_of is None:
            return stored
        return jax.lax.bitcast_convert_type(stored, self.dtype)


def empty_pages(
    pages: int,
    page_size: int,
    kv_heads: int,
    head_dim: int,
    dtype: str = "bfloat16",
    *,
    value_dim: int | None = None,
) -> KVPages:
    """Returns pages of zeros.

    Args:
      pages: how many.
      page_size: tokens per page.
      kv_heads: K.
      head_dim: H; that of the model or above, where an implementation needs it.
      dtype: `bfloat16`, `float16`, `float32`, `int8` or `float8_e4m3fn`.
      value_dim: of the values; None is H.

    Raises:
      UserError: another type.
    """
    known = (*PLAIN, *QUANTIZED)
    if dtype not in known:
        raise UserError("dtype", dtype, f"is not one of {', '.join(known)}.")
    shape = (pages, kv_heads, page_size, head_dim)
    value_shape = (*shape[:3], head_dim if value_dim is None else value_dim)
    key = jnp.zeros(shape, dtype)
    value = jnp.zeros(value_shape, dtype)
    if dtype in PLAIN:
        return KVPages(key, value)

    # A scale for each token and head: [pages, K, slots]
    scale_shape = shape[:3]
    key_scale = jnp.zeros(scale_shape, jnp.float32)
    value_scale = jnp.zeros(scale_shape, jnp.float32)
    return KVPages(key, value, key_scale, value_scale)


def in_bits(pages: KVPages) -> KVPages:
    """Returns pages that hold the bits of their numbers, where the type is one of `BITS`.

    XLA for CPU writes into an array of bfloat16 or float8 by widening all of it, which takes 3 ms
    and twice the memory for a pool of 25 MB. It writes integers in place.
    """
    name = pages.dtype.name
    if pages.bits_of is not None or name not in BITS:
        return pages
    key, value = (jax.lax.bitcast_convert_type(x, BITS[name]) for x in (pages.key, pages.value))
    return dataclasses.replace(pages, key=key, value=value, bits_of=name)


def quantize(
    x: Float[Array, "*tokens H"], dtype: str
) -> tuple[Shaped[Array, "*tokens H"], Float[Array, "*tokens"]]:
    """Returns numbers and scales, x ≈ numbers · scale with scale = max |x| / m and m the largest
    number of the type.

    Args:
      x: one token and head per row.
      dtype: of `QUANTIZED`. The error is at most scale / 2 in int8, and in float8_e4m3fn at most
        |x| / 16, or half of the type's smallest step, scale / 1024.
    """
    x = x.astype(jnp.float32)
    magnitude = jnp.abs(x)
    scale = jnp.max(magnitude, axis=-1) / QUANTIZED[dtype]
    # Zeros have scale 0 and stay zeros.
    divisor = jnp.where(scale > 0, scale, 1.0)
    numbers = x / divisor[..., None]
    if dtype == "int8":
        numbers = jnp.round(numbers)
    return numbers.astype(dtype), scale


def write(
    pages: KVPages,
    table: Int[Array, "B pages_per_sequence"],
    lengths: Int[Array, "B"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K value"],
) -> KVPages:
    """Returns the pages with T new tokens appended to each sequence, quantized where the pages are.

    Args:
      pages: donate them to a compiled caller, and nothing else is copied.
      table: page of each `page_size` tokens. A token is dropped if its page id is not that of a
        page, or if it is past the table's end: -1 marks sequences that get no tokens.
      lengths: tokens that each sequence holds so far.
      key, value: the new tokens; zeros are added where the pages are wider.
    """
    heads = sharding_axes((TENSOR_AXIS,), pages.kv_heads)
    if not heads:
        return _write(pages, table, lengths, key, value)
    # Each device writes the tokens of all sequences, of its own heads. A partitioner would send it
    # those of the others.
    page_specs = jax.tree.map(lambda _: PartitionSpec(None, heads), pages)
    by_head = PartitionSpec(None, None, heads)
    everywhere = PartitionSpec()
    in_specs = (page_specs, everywhere, everywhere, by_head, by_head)
    return shard_map(_write, in_specs, page_specs)(pages, table, lengths, key, value)


def _write(
    pages: KVPages,
    table: Int[Array, "B pages_per_sequence"],
    lengths: Int[Array, "B"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K value"],
) -> KVPages:
    """As `write`, on a device."""
    count, _, page_size, _ = pages.key.shape
    num_new = key.shape[1]
    table_pages = table.shape[1]
    key = _widen(key, pages.key.shape[3])
    value = _widen(value, pages.value.shape[3])

    # Length 5 and pages of 4: new tokens at positions [5, 6, 7, 8], entries [1, 1, 1, 2] of the
    # table, slots [1, 2, 3, 0].
    offsets = jnp.arange(num_new)
    positions = lengths[:, None] + offsets[None]
    entries = positions // page_size
    in_table = jnp.minimum(entries, table_pages - 1)
    ids = jnp.take_along_axis(table, in_table, axis=1)
    # An index out of range is dropped, but a negative one would count from the end.
    is_page = (entries < table_pages) & (ids >= 0)
    ids = jnp.where(is_page, ids, count)
    slots = positions % page_size
    # [B, T] -> [B, T, K]: an index for each head too. Of a token's heads at a time, XLA for TPU
    # scatters in another layout of the pages, and copies all of them to it and back.
    heads = jnp.arange(pages.kv_heads)[None, None]
    ids = ids[:, :, None]
    slots = slots[:, :, None]

    def put(old: Array, new: Array) -> Array:
        return old.at[ids, heads, slots].set(new, mode="drop")

    def put_numbers(old: Array, new: Array) -> Array:
        new = new.astype(pages.dtype)
        return put(old, jax.lax.bitcast_convert_type(new, old.dtype))

    if not pages.quantized:
        key = put_numbers(pages.key, key)
        value = put_numbers(pages.value, value)
        return dataclasses.replace(pages, key=key, value=value)

    key, key_scale = quantize(key, pages.dtype.name)
    value, value_scale = quantize(value, pages.dtype.name)
    return dataclasses.replace(
        pages,
        key=put_numbers(pages.key, key),
        value=put_numbers(pages.value, value),
        key_scale=put(pages.key_scale, key_scale),
        value_scale=put(pages.value_scale, value_scale),
    )


def _widen(x: Float[Array, "B T K H"], width: int) -> Float[Array, "B T K width"]:
    """Returns heads that end in zeros up to a width."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[3])))


def gather(
    pages: KVPages, table: Int[Array, "B pages_per_sequence"]
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K value"]]:
    """Returns the dense keys and values of each sequence, in float32 where they are quantized.

    Args:
      pages: all pages.
      table: ids out of range, as there may be past a sequence's end, read some page.
    """

    def dense(x: Array, scale: Array | None) -> Array:
        found = pages.numbers(x.at[table].get(mode="clip"))
        if scale is not None:
            its_scale = scale.at[table].get(mode="clip")
            found = found.astype(jnp.float32) * its_scale[..., None]

        # [B, pages_per_sequence, K, page_size, H] -> [B, S, K, H]
        batch, entries, heads, page_size, width = found.shape
        by_slot = jnp.swapaxes(found, 2, 3)
        return by_slot.reshape(batch, entries * page_size, heads, width)

    key = dense(pages.key, pages.key_scale)
    value = dense(pages.value, pages.value_scale)
    return key, value


def page_range(
    lengths: Int[Array, "B"], queries: int, page_size: int, window: int | None
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Returns of each sequence the first entry of the table that its queries need, and the end.

    Args:
      lengths: tokens of each sequence.
      queries: T, its newest tokens.
      page_size: tokens per page.
      window: of the attention, or None.
    """
    # Lengths [5, 0] and pages of 4 -> ends [2, 0]
    end = jax.lax.div(lengths + page_size - 1, page_size)
    if window is None:
        return jnp.zeros_like(end), end

    # The first query, at length - T, attends to the window's keys up to its own.
    # Length 10, T = 1, window 4 -> oldest key 6, which is in entry 1 of pages of 4.
    oldest = jnp.maximum(lengths - queries - window + 1, 0)
    first = jax.lax.div(oldest, page_size)
    first = jnp.minimum(first, end)
    return first, end
