"""In which order of axes parameters lie on an accelerator, so that a step reads them as they are.

A product may want its matrix in another order of axes than a checkpoint has. A program that is
given such a matrix copies it each time that it runs, and a step of an engine runs for every token.
So the compiler is asked once which orders it would have, and parameters are put so where it then
copies less: it was seen to ask for an order, and then to copy from that all the same. What guesses
on the device, and a smaller model that guesses, are not asked about.
"""

import functools
import logging
import re
from typing import Any

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh
from jax.tree_util import PyTreeDef, tree_map_with_path

from research.core.trees import named_leaves, path_name
from research.inference.lowered_step import StepSizes, lower_step
from research.inference.program_names import step_tiles
from research.inference.serve_config import ServeConfig
from research.models.language_model import LanguageModelConfig
from research.parallel.mesh import on_mesh
from research.parallel.target import platform

# By kind of parameter, which is its name without the index of the layer.
Layouts = dict[str, Layout]
# No further layouts are tried where temporaries are below so many times those with the compiler's.
_CLOSE = 2

logger = logging.getLogger("tessera")


def step_layouts(
    config: LanguageModelConfig, params: Any, mesh: Mesh | None, serve: ServeConfig
) -> Layouts:
    """Returns the layouts of `chosen_layouts` for an engine. On CPU, where matrix products take
    either order, and on devices that do not tell layouts, there are none.

    Args:
      config: of the model.
      params: its parameters, or their shapes and shardings.
      mesh: of a replica; None is one device.
      serve: how the engine runs.
    """
    with on_mesh(mesh):
        if platform() == "cpu":
            return {}
    cache_dtype = None if serve.cache_dtype == "auto" else serve.cache_dtype
    sizes = StepSizes(
        serve.slots,
        config.max_length,
        step_tiles(config, serve)[-1],
        serve.padded_rows(),
        serve.page_size,
        cache_dtype,
    )
    try:
        return chosen_layouts(config, params, mesh, sizes)
    except NotImplementedError as error:
        logger.info("parameters stay in JAX's own layouts: %s", error)
        return {}


def chosen_layouts(
    config: LanguageModelConfig, params: Any, mesh: Mesh | None, sizes: StepSizes
) -> Layouts:
    """Returns layouts of parameters with which a step has fewer temporaries than with JAX's own:
    the compiler's choice, with some kinds row by row where it then has fewer still; none where
    there are no such layouts. Parameters that the step does not read have none.

    Args:
      config: of the model.
      params: its parameters, or their shapes and shardings.
      mesh: as of `lower_step`.
      sizes: of the largest step.

    Raises:
      NotImplementedError: the devices tell no layouts or no temporaries.
    """
    leaves, tree = jax.tree.flatten(params)
    shapes = tuple(_shape(leaf, leaf.sharding) for leaf in leaves)
    return _chosen(config, shapes, tree, mesh, sizes)


# `generate` makes an engine for each call.
@functools.lru_cache(maxsize=8)
def _chosen(
    config: LanguageModelConfig,
    leaves: tuple[jax.ShapeDtypeStruct, ...],
    tree: PyTreeDef,
    mesh: Mesh | None,
    sizes: StepSizes,
) -> Layouts:
    shapes = tree.unflatten(leaves)

    def compile_with(layouts: Layouts, *, choose_layouts: bool = False) -> tuple[int, Layouts]:
        given = formatted(shapes, layouts)
        step = lower_step(config, given, mesh, sizes, choose_layouts=choose_layouts)
        program = step.lowered.compile()
        (formats, *_), _ = program.input_formats
        memory = program.memory_analysis()
        if memory is None:
            raise NotImplementedError("temporaries are not told")
        return memory.temp_size_in_bytes, _layouts(formats)

    own_bytes, own = compile_with({})
    chosen_bytes, choice = compile_with({}, choose_layouts=True)
    best = {kind: layout for kind, layout in choice.items() if layout != own[kind]}
    if not best:
        return {}
    best_bytes, _ = compile_with(best)
    for kind, layout in choice.items():
        by_rows = Layout(tuple(sorted(layout.major_to_minor)))
        if best_bytes <= _CLOSE * chosen_bytes or by_rows.major_to_minor == layout.major_to_minor:
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
    found = {}
    for name, leaf in named_leaves(formats).items():
        # What a program does not read has none.
        if leaf.layout is not None:
            found[_kind(name)] = leaf.layout
    return found


def _shape(leaf: Any, placed: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)
