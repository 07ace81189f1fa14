"""Which parameters a run trains: the others are frozen, with no gradient, no moment and no average.

A parameter is trained whole, or in some of its rows (rows of the embedding, or layers of a stack).
Both parts are trees with the parameters' own names; a frozen tree also holds the arrays of which
only rows are trained, and those rows of it are never read.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from research.core.errors import UserError
from research.core.trees import named_leaves, nested, path_name
from research.parallel.parameter import is_box

# Whole parts of a model that stand between its last states and its outputs.
HEADS = ("unembed", "logit_bias", "transform", "pooler")
_UNROLLED = re.compile(r"(?P<stack>(?:.*/)?)(?P<first>first_)?layers_(?P<index>\d+)/.*")
_SCANNED = re.compile(r"(?P<stack>(?:.*/)?)layers/.*")

# name -> the rows that are trained, or None for all of them
Selection = dict[str, tuple[int, ...] | None]


@dataclasses.dataclass(frozen=True)
class TrainableConfig:
    """Which parameters are trained.

    Attributes:
      select: `all`; `heads` (output projection, its transform and bias, pooler); `last_layers` of
        each stack; `biases` (whatever is added to activations or attention scores, but not the
        selection biases of experts, which their load moves); `pattern`; `embedding_rows` (of the
        table of token embeddings).
      num_layers: for `last_layers`: how many, at least 1.
      pattern: for `pattern`: a regular expression that is searched for in a parameter's path, such
        as `attention/(query|key)/`.
      rows: for `embedding_rows`: ids of the tokens.
      frozen_dtype: the type that frozen parameters are kept in; None is their own.
    """

    select: Literal["all", "heads", "last_layers", "biases", "pattern", "embedding_rows"] = "all"
    num_layers: int = 1
    pattern: str = ""
    rows: tuple[int, ...] = ()
    frozen_dtype: Literal["float32", "bfloat16"] | None = None

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise UserError("num_layers", self.num_layers, "must be at least 1.")
        if self.select == "pattern" and not self.pattern:
            raise UserError("pattern", "", "must be a regular expression for select = 'pattern'.")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(
                "pattern", self.pattern, f"is not a regular expression: {error}."
            ) from error
        if self.select == "embedding_rows" and not self.rows:
            raise UserError(
                "rows", (), "must name at least one token for select = 'embedding_rows'."
            )
        if len(set(self.rows)) < len(self.rows) or min(self.rows, default=0) < 0:
            raise UserError("rows", self.rows, "must be different ids, none below 0.")


@dataclasses.dataclass(frozen=True)
class Partition:
    """Cuts a tree of parameters in two, and puts it together again.

    Attributes:
      selection: what is trained; None: everything.
      frozen_dtype: of floating frozen arrays; None leaves them as they are.
    """

    selection: Selection | None = None
    frozen_dtype: str | None = None

    def split(self, params: Any) -> tuple[Any, Any]:
        """Returns the trainable and the frozen parameters, of plain or boxed arrays."""
        if self.selection is None:
            return params, {}
        trainable, frozen = {}, {}
        for name, leaf in _leaves(params).items():
            if name not in self.selection:
                frozen[name] = _changed(leaf, self._cast)
            elif (rows := self.selection[name]) is None:
                trainable[name] = leaf
            else:
                trainable[name] = _rows(leaf, rows)
                frozen[name] = _changed(leaf, self._cast)
        return nested(trainable), nested(frozen)

    def merge(self, trainable: Any, frozen: Any) -> Any:
        """Returns all parameters; an array of which rows are trained has these put into it."""
        if self.selection is None:
            return trainable
        whole = named_leaves(frozen)
        for name, leaf in named_leaves(trainable).items():
            rows = self.selection[name]
            if rows is not None:
                leaf = whole[name].astype(leaf.dtype).at[np.array(rows)].set(leaf)
            whole[name] = leaf
        return nested(whole)

    def frozen_names(self, params: Any) -> frozenset[str]:
        """Returns the names of the parameters of which no row is trained."""
        return frozenset(
            () if self.selection is None else _leaves(params).keys() - self.selection.keys()
        )

    def trained_rows(self, name: str, array: Any) -> Any:
        """Returns the rows of an array that stand for the trained rows of a parameter; all where it
        is not cut.

        Args:
          name: of the parameter.
          array: has a row for each of the parameter's, as the load of stacked experts has for their
              selection biases.
        """
        rows = (
            None if self.selection is None or name not in self.selection else self.selection[name]
        )
        # [L, E] -> [n, E] where n of L stacked layers are trained
        return array if rows is None else array[np.array(rows)]

    def _cast(self, array: Any) -> Any:
        if self.frozen_dtype is None or not jnp.issubdtype(array.dtype, jnp.floating):
            return array
        return array.astype(self.frozen_dtype)


# What a run without a choice trains.
EVERYTHING = Partition()


def _leaves(params: Any) -> dict[str, Any]:
    """Returns the (boxed) arrays by name."""
    paths = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box)
    return {path_name(path): leaf for path, leaf in paths}


def _changed(leaf: Any, change: Callable[[Any], Any]) -> Any:
    """Returns an array, or the box of one, after `change`."""
    return leaf.replace(value=change(leaf.value)) if is_box(leaf) else change(leaf)


def _rows(leaf: Any, rows: tuple[int, ...]) -> Any:
    """Returns some rows of an array, or of the array in a box; rows of a table are on every
    device.
    """
    taken = _changed(leaf, lambda array: array[np.array(rows)])
    if not is_box(leaf) or leaf.names[0] == "layers":
        return taken
    return taken.replace(names=(None, *leaf.names[1:]))


def build_partition(config: TrainableConfig, boxed: Any) -> Partition:
    """Returns the partition of a model's parameters.

    Args:
      config: what to train.
      boxed: abstract parameters with their logical axes.

    Raises:
      UserError: nothing is selected, so everything would be frozen; the message names what there
          is.
    """
    leaves = _leaves(boxed)
    if config.select == "all":
        return EVERYTHING
    selection = _select(config, leaves)
    if not selection:
        raise UserError(
            "train.trainable",
            constraint=f": select = {_describe(config)} matches no parameter, so everything would "
            "be frozen. "
            f"There are: {_listed(leaves)}.",
        )
    return Partition(selection, config.frozen_dtype)


def _select(config: TrainableConfig, leaves: Mapping[str, Any]) -> Selection:
    if config.select == "heads":
        return dict.fromkeys(name for name in leaves if name.partition("/")[0] in HEADS)
    if config.select == "biases":
        return dict.fromkeys(name for name, box in leaves.items() if box.kind == "bias")
    if config.select == "pattern":
        return dict.fromkeys(name for name in leaves if re.search(config.pattern, name))
    if config.select == "embedding_rows":
        size = leaves["embed/embedding"].value.shape[0]
        if max(config.rows) >= size:
            raise UserError(
                "train.trainable.rows",
                constraint=f": {max(config.rows)} is not below model.vocab_size = {size}.",
            )
        return {"embed/embedding": config.rows}
    return _last_layers(config.num_layers, leaves)


def _last_layers(count: int, leaves: Mapping[str, Any]) -> Selection:
    """Selects the last layers of each stack, whether its layers are unrolled or stacked."""
    # stack -> (whether it is a later layer, index) of each layer, in the order of the layers
    order: dict[str, set[tuple[bool, int]]] = {}
    for name, box in leaves.items():
        if found := _UNROLLED.fullmatch(name):
            order.setdefault(found["stack"], set()).add(
                (found["first"] is None, int(found["index"]))
            )
        elif found := _SCANNED.fullmatch(name):
            order.setdefault(found["stack"], set()).update(
                (True, i) for i in range(box.value.shape[0])
            )
    last = {stack: set(sorted(layers)[-count:]) for stack, layers in order.items()}

    selection: Selection = {}
    for name, box in leaves.items():
        if found := _UNROLLED.fullmatch(name):
            if (found["first"] is None, int(found["index"])) in last[found["stack"]]:
                selection[name] = None
        elif found := _SCANNED.fullmatch(name):
            rows = tuple(i for i in range(box.value.shape[0]) if (True, i) in last[found["stack"]])
            selection[name] = None if len(rows) == box.value.shape[0] else rows
    return selection


def _describe(config: TrainableConfig) -> str:
    return (
        f"'pattern', pattern = {config.pattern!r}"
        if config.select == "pattern"
        else repr(config.select)
    )


def _listed(names: Mapping[str, Any]) -> str:
    shown = list(names)[:10]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
