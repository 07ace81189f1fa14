"""`shard_map` over the mesh in context, for code that no partitioner can shard."""

import contextlib
import contextvars
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

from research.parallel.mesh_axes import BATCH_AXES, CONTEXT_AXIS

_IS_BATCH_WHOLE: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "is_batch_whole", default=False
)


@contextlib.contextmanager
def whole_batch() -> Iterator[None]:
    """Shards no batch in what is traced inside: every device computes all of its rows.

    It is for a few new tokens whose keys all devices need: to compute a row costs less than to send
    it.
    """
    token = _IS_BATCH_WHOLE.set(True)
    try:
        yield
    finally:
        _IS_BATCH_WHOLE.reset(token)


def is_batch_whole() -> bool:
    """Whether `whole_batch` holds here."""
    return _IS_BATCH_WHOLE.get()


def batch_axes(rows: int) -> tuple[str, ...]:
    """Returns the mesh axes over which the rows of a batch are sharded: as `dividing_axes`, and
    none inside `whole_batch`.
    """
    if is_batch_whole():
        return ()
    return dividing_axes(BATCH_AXES, rows)


def sharding_axes(names: tuple[str, ...], *sizes: int) -> tuple[str, ...]:
    """Returns the mesh axes over which array axes are sharded: those of `names` in the mesh in
    context, or none.

    They are none where the mesh has only one device along them, or where together they do not
    divide every size.

    Args:
      names: mesh axes that may shard an array axis.
      sizes: of the array axes that are to be sharded in the same way.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(name for name in names if name in mesh.axis_names)
    shards = math.prod(mesh.shape[name] for name in axes)

    # 2 shards divide sizes (8, 6), and not (8, 3).
    divided = all(size % shards == 0 for size in sizes)
    if shards > 1 and divided:
        return axes
    return ()


def dividing_axes(names: tuple[str, ...], size: int) -> tuple[str, ...]:
    """Returns the first mesh axes of `names` over which an array axis can be sharded: those of the
    mesh in context that together divide its size, without axes of one device.

    Args:
      names: mesh axes that may shard the array axis, the most wanted first.
      size: of the array axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes: list[str] = []
    shards = 1
    for name in names:
        if name not in mesh.axis_names or mesh.shape[name] == 1:
            continue
        # Sizes 2, 2 and 4 of the axes, and 4 rows: the first two.
        shards *= mesh.shape[name]
        if size % shards:
            break
        axes.append(name)
    return tuple(axes)


def shards_tokens(sizes: tuple[int, ...]) -> bool:
    """Whether the mesh in context shards the second axis of an array: the tokens of its rows."""
    return len(sizes) > 1 and bool(sharding_axes((CONTEXT_AXIS,), sizes[1]))


def merge_rows(x: Shaped[Array, "*batch"], num_axes: int) -> Shaped[Array, "*rows"]:
    """Returns an array with its first axes merged, where the mesh shards the first two: each device
    merges its own part.

    So the order of the rows is that of the devices, [B, T] -> [B T], the same for all arrays of
    these sizes; no device needs what another has.

    Args:
      x: rows of a batch, then their tokens.
      num_axes: how many axes are merged.
    """
    width = x.shape[num_axes:]
    if num_axes != 2 or not shards_tokens(x.shape):
        return x.reshape(-1, *width)
    rows = sharding_axes(BATCH_AXES, x.shape[0])
    tokens = (CONTEXT_AXIS,)
    mapped = shard_map(
        lambda part: part.reshape(-1, *width),
        PartitionSpec(rows or None, tokens),
        PartitionSpec((*rows, *tokens)),
        axes=(*rows, *tokens),
    )
    return mapped(x)


def per_token(function: Callable[..., Any], x: Shaped[Array, "B T *rest"]) -> Any:
    """Returns a function of the tokens of a batch, which each device computes for its own.

    It is for what the partitioner gathers all tokens for, a choice of the best scores among it.

    Args:
      function: takes and gives arrays whose first axes are [B, T]; no token's result depends on
        another token.
      x: of all devices.
    """
    rows = batch_axes(x.shape[0])
    tokens = dividing_axes((CONTEXT_AXIS,), x.shape[1])
    if not (rows or tokens):
        return function(x)
    spec = PartitionSpec(rows or None, tokens or None)
    return shard_map(function, spec, spec, axes=(*rows, *tokens))(x)


def shard_map(
    function: Callable[..., Any], in_specs: Any, out_specs: Any, axes: Collection[str] | None = None
) -> Callable[..., Any]:
    """Returns a function in a `jax.shard_map` over the mesh in context.

    Args:
      function: what no partitioner can shard; it takes a device's shards of the arguments.
      in_specs, out_specs: trees of `PartitionSpec`, as `jax.shard_map` takes them.
      axes: mesh axes that are manual in `function`; the others stay with the partitioner. None is
        all that are not manual already.
    """
    if axes is None:
        mesh = jax.sharding.get_abstract_mesh()
        axes = set(mesh.axis_names) - set(mesh.manual_axes)
    mapped = jax.shard_map(
        function, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes), check_vma=False
    )
    # Axes that shard nothing here stay with the partitioner, which only compiled code has.
    return jax.jit(mapped)
