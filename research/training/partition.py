"""Which parameters a run trains: the others are frozen, with no gradient, no moment and no average.

All of a parameter is trained, or some of its rows (rows of the embedding, or layers of a stack).
The trainable and the frozen parameters are two trees with the model's names. An array of which only
rows are trained is in both: its trained rows in one, the complete array in the other, where those
rows are never read.
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

# Modules between the last hidden states of a model and its outputs.
HEADS = ("unembed", "logit_bias", "transform", "pooler")
_UNROLLED = re.compile(r"(?P<stack>(?:.*/)?)(?P<first>first_)?layers_(?P<index>\d+)/.*")
_SCANNED = re.compile(r"(?P<stack>(?:.*/)?)layers/.*")

# (whether it comes after the `first_layers`, index among those like it); sorts in layer order
_Layer = tuple[bool, int]
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
        trainable = {}
        frozen = {}
        for name, leaf in _leaves(params).items():
            if name not in self.selection:
                frozen[name] = _map_array(leaf, self._cast)
                continue
            rows = self.selection[name]
            if rows is None:
                trainable[name] = leaf
            else:
                trainable[name] = _rows(leaf, rows)
                frozen[name] = _map_array(leaf, self._cast)
        return nested(trainable), nested(frozen)

    def merge(self, trainable: Any, frozen: Any) -> Any:
        """Returns all parameters; trained rows are put into their frozen arrays."""
        if self.selection is None:
            return trainable
        params = named_leaves(frozen)
        for name, leaf in named_leaves(trainable).items():
            rows = self.selection[name]
            if rows is not None:
                # [n, D] into rows of [V, D]
                leaf = params[name].astype(leaf.dtype).at[np.array(rows)].set(leaf)
            params[name] = leaf
        return nested(params)

    def frozen_names(self, params: Any) -> frozenset[str]:
        """Returns the names of the parameters of which no row is trained."""
        if self.selection is None:
            return frozenset()
        return frozenset(_leaves(params).keys() - self.selection.keys())

    def trained_rows(self, name: str, array: Any) -> Any:
        """Returns the rows of an array that belong to the trained rows of a parameter.

        Args:
          name: of the parameter.
          array: has a row for each of the parameter's, as the load of stacked experts has for their
              selection biases.
        """
        if self.selection is None:
            return array
        rows = self.selection.get(name)
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
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box)
    return {path_name(path): leaf for path, leaf in leaves}


def _map_array(leaf: Any, change: Callable[[Any], Any]) -> Any:
    """Returns an array, or the box of one, after `change`."""
    return leaf.replace(value=change(leaf.value)) if is_box(leaf) else change(leaf)


def _rows(leaf: Any, rows: tuple[int, ...]) -> Any:
    """Returns some rows of an array, or of the array in a box.

    Rows of a table, unlike layers of a stack, are replicated: their number fits no mesh.
    """
    taken = _map_array(leaf, lambda array: array[np.array(rows)])
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
            f"be frozen. There are: {_listed(leaves)}.",
        )
    return Partition(selection, config.frozen_dtype)


def _select(config: TrainableConfig, leaves: Mapping[str, Any]) -> Selection:
    if config.select == "embedding_rows":
        return _embedding_rows(config.rows, leaves)
    if config.select == "last_layers":
        return _last_layers(config.num_layers, leaves)
    if config.select == "heads":
        names = [name for name in leaves if name.partition("/")[0] in HEADS]
    elif config.select == "biases":
        names = [name for name, box in leaves.items() if box.kind == "bias"]
    else:
        assert config.select == "pattern"
        names = [name for name in leaves if re.search(config.pattern, name)]
    return dict.fromkeys(names)


def _embedding_rows(rows: tuple[int, ...], leaves: Mapping[str, Any]) -> Selection:
    """Selects rows of the table of token embeddings."""
    name = "embed/embedding"
    size = leaves[name].value.shape[0]
    if max(rows) >= size:
        raise UserError(
            "train.trainable.rows",
            constraint=f": {max(rows)} is not below model.vocab_size = {size}.",
        )
    return {name: rows}


def _last_layers(count: int, leaves: Mapping[str, Any]) -> Selection:
    """Selects the last layers of each stack, whether its layers are unrolled or stacked."""
    layers_of = {name: _layers(name, box.value.shape) for name, box in leaves.items()}
    layers_of = {name: layers for name, layers in layers_of.items() if layers}

    # {"encoder/": {(False, 0), (True, 0), (True, 1)}}, of all layers -> those of the last `count`
    stacks: dict[str, set[_Layer]] = {}
    for name, layers in layers_of.items():
        stacks.setdefault(_stack(name), set()).update(layers)
    last = {stack: set(sorted(layers)[-count:]) for stack, layers in stacks.items()}

    selection: Selection = {}
    for name, layers in layers_of.items():
        trained = [row for row, layer in enumerate(layers) if layer in last[_stack(name)]]
        if len(trained) == len(layers):
            selection[name] = None
        elif _SCANNED.fullmatch(name):
            selection[name] = tuple(trained)
    return selection


def _stack(name: str) -> str:
    """Returns the path of the stack that a layer's parameter is in, `encoder/` or ``."""
    found = _UNROLLED.fullmatch(name) or _SCANNED.fullmatch(name)
    return found["stack"]


def _layers(name: str, shape: tuple[int, ...]) -> list[_Layer]:
    """Returns the layers that a parameter belongs to, in the order of its rows; [] outside layers.

    `layers_2/…` -> [(True, 2)]; `layers/…` of [3, D, F] -> [(True, 0), (True, 1), (True, 2)]
    """
    found = _UNROLLED.fullmatch(name)
    if found:
        after_first = found["first"] is None
        return [(after_first, int(found["index"]))]
    if _SCANNED.fullmatch(name):
        return [(True, index) for index in range(shape[0])]
    return []


def _describe(config: TrainableConfig) -> str:
    if config.select == "pattern":
        return f"'pattern', pattern = {config.pattern!r}"
    return repr(config.select)


def _listed(names: Mapping[str, Any]) -> str:
    shown = list(names)[:10]
    text = ", ".join(shown)
    more = len(names) - len(shown)
    return f"{text} and {more} more" if more else text
