"""In which order of axes parameters lie on an accelerator, so that a step reads them as they are.

A product may want its matrix in another order of axes than a checkpoint has. A program that is
given such a matrix copies it each time that it runs, and a step of an engine runs for every token.
So the compiler is asked once which orders it would have, and parameters are put so where it then
copies less: it was seen to ask for an order, and then to copy from that all the same.
"""

import re
from typing import Any

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh
from jax.tree_util import tree_map_with_path

from research.core.trees import named_leaves, path_name
from research.inference.lowered_step import StepSizes, lower_step
from research.inference.program_names import step_tiles
from research.inference.serve_config import ServeConfig
from research.models.language_model import LanguageModelConfig
from research.parallel.mesh import on_mesh
from research.parallel.target import platform

# By kind of parameter, which is its name without the index of the layer.
Layouts = dict[str, Layout]
# A program keeps its word where its temporaries are below so many times the promised ones.
_KEPT = 2


def lay_out(
    config: LanguageModelConfig, parts: list[Any], meshes: list[Mesh | None], serve: ServeConfig
) -> list[Any]:
    """Returns the parameters of each replica as steps read them best: those that lie otherwise are
    copies. On CPU, where matrix products take either order, they are those that are given.

    Args:
      config: of the model.
      parts: the parameters of each replica, on their devices.
      meshes: of each replica; None is one device.
      serve: how the engine runs.
    """
    with on_mesh(meshes[0]):
        if platform() == "cpu":
            return parts
    sizes = StepSizes(
        serve.slots,
        config.max_length,
        step_tiles(config, serve)[-1],
        serve.padded_rows(),
        serve.page_size,
    )
    # Replicas differ in their devices alone.
    layouts = chosen_layouts(config, parts[0], meshes[0], sizes)
    return [formatted(part, layouts) for part in parts]


def lie_as(new: jax.Array, old: jax.Array) -> jax.Array:
    """Returns an array that lies on the same devices as another one, in that one's layout."""
    if new.format.layout == old.format.layout:
        return new
    return jax.device_put(new, old.format)


def chosen_layouts(
    config: LanguageModelConfig, params: Any, mesh: Mesh | None, sizes: StepSizes
) -> Layouts:
    """Returns the layouts of the parameters that a step had better find in another than JAX's own:
    the compiler's choice, with some kinds row by row where it then has fewer temporaries; none
    where that is no better than what JAX does by itself.

    Args:
      config: of the model.
      params: its parameters, or their shapes and shardings.
      mesh: as of `lower_step`.
      sizes: of the largest step.
    """
    shapes = jax.tree.map(_shape, params)

    def compile_with(layouts: Layouts, *, choose_layouts: bool = False) -> tuple[int, Any]:
        given = formatted(shapes, layouts)
        step = lower_step(config, given, mesh, sizes, choose_layouts=choose_layouts)
        program = step.lowered.compile()
        (formats, *_), _ = program.input_formats
        return program.memory_analysis().temp_size_in_bytes, formats

    own_bytes, own = compile_with({})
    promised, wanted = compile_with({}, choose_layouts=True)
    defaults = _layouts(own)
    choice = _layouts(wanted)

    best = {kind: layout for kind, layout in choice.items() if layout != defaults[kind]}
    if not best:
        return best
    best_bytes, _ = compile_with(best)
    for kind, layout in choice.items():
        by_rows = Layout(tuple(sorted(layout.major_to_minor)))
        if best_bytes <= _KEPT * promised or by_rows.major_to_minor == layout.major_to_minor:
            continue
        changed = {**best, kind: by_rows}
        found, _ = compile_with(changed)
        if found < best_bytes:
            best = changed
            best_bytes = found
    return best if best_bytes < own_bytes else {}


def formatted(params: Any, layouts: Layouts) -> Any:
    """Returns parameters, or their shapes, in layouts; those without one stay as they are.

    Args:
      params: arrays, or shapes with shardings.
      layouts: as of `chosen_layouts`.
    """

    def put(path: Any, leaf: Any) -> Any:
        layout = layouts.get(_kind(path_name(path)))
        if layout is None:
            return leaf
        placed = Format(layout, leaf.sharding)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return _shape(leaf, placed)
        return jax.device_put(leaf, placed)

    return tree_map_with_path(put, params)


def _kind(name: str) -> str:
    # layers_12/mlp/down/kernel -> layers/mlp/down/kernel
    return re.sub(r"_\d+/", "/", name)


def _layouts(formats: Any) -> Layouts:
    return {_kind(name): leaf.layout for name, leaf in named_leaves(formats).items()}


def _shape(leaf: Any, placed: Any = None) -> jax.ShapeDtypeStruct:
    placed = leaf.sharding if placed is None else placed
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)
