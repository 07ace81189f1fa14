"""`tessera bench engine --only=steps`: the step of an engine that reads tokens, compiled for TPUs
that are not here.

The part runs in a process of its own, `python -m research.bench.engine_steps FOLDER CHIP`, since
the compiler reads where to write the schedules of kernels when it is loaded. It prints what it
found as JSON.
"""

import dataclasses
import json
import math
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.bench.engine_row import Row
from research.bench.estimated_cycles import estimated_cycles
from research.bench.instruction_schedule import kernel_programs, run_program
from research.bench.llama_shapes import LLAMA_134M
from research.bench.serving_models import bytes_a_step
from research.bench.sides import run
from research.core.errors import UserError
from research.inference.layouts import formatted, step_layouts
from research.inference.lowered_step import StepSizes, lower_step
from research.inference.serve_config import ServeConfig
from research.kernels.attention import ScoreTerms
from research.kernels.decode_attention import PAGE_SIZE, pages_for, tpu
from research.models.config import ModelConfig
from research.models.language_model import abstract_params
from research.models.stack import resolve_layer_loop
from research.parallel.mesh import make_mesh
from research.parallel.mesh_config import MeshConfig
from research.parallel.target import compiling_for
from research.scaling.collectives import Collective, collectives
from research.scaling.topology import check_tpu_compiler, tpu_devices

SIDE = "research.bench.engine_steps"
MODEL = dataclasses.replace(LLAMA_134M, dtype="bfloat16", param_dtype="bfloat16")
CHIPS = ("v5e", "v5p", "v6e")
SERVE = ServeConfig()
TILE = SERVE.tiles[-1]
# Tiles of the steps that are counted: newest tokens alone, and prompts beside them.
STEPS = (1, SERVE.padded_rows() // TILE)
# The name of decode attention in a program.
KERNEL = "tessera_decode_attention"


@dataclasses.dataclass(frozen=True)
class CompiledRead:
    """A compiled step.

    Attributes:
      pages: shapes and shardings of the arrays of pages.
      text: of the program.
      exchanged: between devices.
      temporaries: bytes on each device beside arguments and results.
      num_layers: of the model.
    """

    pages: list[jax.ShapeDtypeStruct]
    text: str
    exchanged: list[Collective]
    temporaries: int
    num_layers: int

    @property
    def layer_bytes(self) -> float:
        """Bytes of a layer's pages on a device: of all as many."""
        total = 0
        for leaf in self.pages:
            size = math.prod(on_device(leaf))
            total += size * leaf.dtype.itemsize
        return total / self.num_layers


def on_device(leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """The shape of a device's part."""
    return leaf.sharding.shard_shape(leaf.shape)


def compile_read(
    config: ModelConfig,
    params: Any,
    mesh: Mesh,
    *,
    slots: int,
    tokens: int,
    tile: int,
    rows: int | None = None,
) -> CompiledRead:
    """Compiles a step.

    Args:
      config, params: the model; of the parameters shapes and shardings are needed.
      mesh: of devices that need not exist.
      slots, tokens: as of `ServeConfig`.
      tile: rows of a tile.
      rows: of the step's arrays, whole tiles; None is one tile. How many tiles have rows is said
        when the program is run.
    """
    if rows is None:
        rows = tile
    step = lower_step(config, params, mesh, StepSizes(slots, tokens, tile, rows))
    compiled = step.lowered.compile()
    text = compiled.as_text()
    return CompiledRead(
        step.pages,
        text,
        [each for each in collectives(text, mesh) if each.axes],
        compiled.memory_analysis().temp_size_in_bytes,
        config.num_layers,
    )


def compile_step(config: ModelConfig, device: Any) -> CompiledRead:
    """Compiles the step of an engine with one device, as `ServeConfig` has it where nothing is
    said, with parameters that lie as the engine lays them, and with a cache that holds `max_length`
    tokens in every slot.

    Args:
      config: of the model; layers are in the form that suits a TPU.
      device: of `tpu_devices`.
    """
    config = resolve_layer_loop(config, "tpu")
    mesh = make_mesh(MeshConfig(data=1), [device])
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return leaf.update(sharding=everywhere)

    params = jax.tree.map(place, abstract_params(config, "tpu"))
    params = formatted(params, step_layouts(config, params, mesh, SERVE))
    tokens = SERVE.slots * config.max_length
    rows = SERVE.padded_rows()
    return compile_read(
        config, params, mesh, slots=SERVE.slots, tokens=tokens, tile=TILE, rows=rows
    )


def kernel_cycles(folder: pathlib.Path, config: ModelConfig, device: Any) -> int:
    """Returns the cycles of decode attention in one layer and tile, each row of which attends to
    `max_length` tokens, as its instruction schedule has them.

    Args:
      folder: where the compiler wrote the schedules of a step.
      config, device: that it was compiled for.
    """
    c = config.attention
    with compiling_for("tpu", device.device_kind):
        pages = pages_for(1, c.num_kv_heads, c.head_dim, config.dtype)
        q = jnp.zeros((TILE, 1, c.num_heads, pages.head_dim), config.dtype)
        table_pages = -(-config.max_length // PAGE_SIZE)
        terms = ScoreTerms(None, None, None, None, 1.0)
        plan = tpu.plan_for(q, pages, table_pages, None, terms)

    # The kernel's loops depend on the lengths alone: 16 rows with 2,048 tokens -> 128 pages each
    lengths = jnp.full(TILE, config.max_length, jnp.int32)
    scalars = [np.asarray(each) for each in tpu.prefetched(lengths, plan)]

    # Its name in the dump has a number: `tessera_decode_attention.11`
    programs = kernel_programs(folder)
    [program] = [path for name, path in programs.items() if name.startswith(KERNEL)]
    return run_program(program, scalars).cycles


def measure(folder: pathlib.Path, config: ModelConfig, chip: str) -> dict[str, Any]:
    """Returns what the compiler made of a step for a chip, and the cycles of each of `STEPS`.

    Args:
      folder: where the compiler writes schedules.
      config: of the model.
      chip: of `CHIPS`.
    """
    device = tpu_devices(chip)[0]
    found = compile_step(config, device)
    in_kernel = kernel_cycles(folder, config, device)
    cycles = []
    for tiles in STEPS:
        # The compiler has no estimate of the kernel: its schedule says it.
        of_step = estimated_cycles(found.text, tiles)
        runs = of_step.without.pop(KERNEL)
        cycles.append(
            {
                "estimated": of_step.estimated,
                "kernel": runs * in_kernel,
                "without": sum(of_step.without.values()),
            }
        )
    return {
        "weights": bytes_a_step(config, config.dtype),
        "layer": found.layer_bytes,
        "temporaries": found.temporaries,
        "cycles": cycles,
    }


def step_rows() -> Iterator[Row]:
    """Yields the rows of the part, or why there are none."""
    try:
        check_tpu_compiler()
    except UserError as error:
        yield Row("a step of the engine on TPUs", "", "left out", "", "", str(error))
        return
    for chip in CHIPS:
        with tempfile.TemporaryDirectory(prefix="tessera-steps-") as folder:
            flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
            variables = {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu"}
            printed = run([SIDE, folder, chip], variables=variables)
        # The compiler may print before.
        *_, last_line = printed.splitlines()
        yield from chip_rows(chip, json.loads(last_line))


def chip_rows(chip: str, found: dict[str, Any]) -> Iterator[Row]:
    """Yields a row for each of `STEPS`.

    Args:
      chip: of `CHIPS`.
      found: as of `measure`.
    """
    layer = found["layer"]
    for tiles, cycles in zip(STEPS, found["cycles"], strict=True):
        # Each tile reads all weights.
        weights = tiles * found["weights"]
        kernel = cycles["kernel"]
        without = cycles["without"]
        total = cycles["estimated"] + kernel
        also = (
            f"{kernel:,} of them in decode attention over full slots, by its schedule; the others "
            f"are estimates; left out: {without:,} instructions without one, waits for memory, the "
            "draw"
        )
        yield Row(
            f"a step of {tiles * TILE} rows, TPU {chip}",
            f"{total:,} cycles",
            f"weights {weights / 1e6:,.0f} MB, a layer's pages {layer / 1e6:,.1f} MB",
            f"{found['temporaries'] / layer:.3f}",
            "temporaries below a layer's pages",
            also,
        )


if __name__ == "__main__":
    folder, chip = sys.argv[1:]
    print(json.dumps(measure(pathlib.Path(folder), MODEL, chip)))
