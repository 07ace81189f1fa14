"""Writes the compiled programs that `collectives_test.py` reads: `python -m
tests.scaling.make_programs`.

They are what XLA prints for eight CPU devices, for a v5p:2x2x2 and for a tpu7x:2x2x2, less what
nothing here reads: stack frames and most of the backends' notes.
"""

import os
import pathlib
import re

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from research.parallel.mesh import make_mesh
from research.parallel.mesh_config import MeshConfig
from research.scaling.topology import tpu_devices

PROGRAMS = pathlib.Path(__file__).with_name("programs")
EXCHANGES = MeshConfig(data=2, context=2, tensor=2)
LAYERS = MeshConfig(data=2, fsdp=2, tensor=2)
LAYERS_OF_16 = MeshConfig(data=2, fsdp=2, tensor=4)
# Of the backends' notes these are read.
READ = (r'"known_trip_count":\{[^}]*\}', r'"async_collective_fusion_config":\{[^}]*\}')
SPREAD = {
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_enable_async_all_gather": "true",
}


def exchanges(mesh: Mesh) -> jax.stages.Traced:
    """One collective of each kind, in a loop, in branches, and in a loop of unknown length."""

    def to_heads(x):
        return jax.lax.all_to_all(x, "tensor", 1, 0, tiled=True).reshape(4, 8)

    def around(x):
        return jax.lax.ppermute(x, "context", [(0, 1), (1, 0)])

    def device(x, branch):
        branches = [to_heads, around, lambda x: x * 2.0]
        x, _ = jax.lax.scan(
            lambda x, _: (jax.lax.switch(branch[0], branches, x), None), x, None, length=3
        )
        x = jax.lax.psum_scatter(x, "data", scatter_dimension=0, tiled=True)
        x = jax.lax.all_gather(x, ("data", "context"), axis=0, tiled=True)
        return jax.lax.while_loop(
            lambda x: jnp.sum(x) < 100.0, lambda x: jax.lax.psum(x, "context") + 1.0, x
        )

    replicated = NamedSharding(mesh, P())
    x = jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=replicated)
    branch = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=replicated)
    mapped = jax.shard_map(device, mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False)
    return jax.jit(mapped).trace(x, branch)


def layers(mesh: Mesh) -> jax.stages.Traced:
    """Gradients of four scanned layers, sharded over all axes of the mesh."""

    def layer(x, params):
        up, down = params
        hidden = jax.nn.relu(jnp.einsum("btd,df->btf", x, up))
        out = jnp.einsum("btf,fd->btd", hidden, down)
        return x + jax.lax.with_sharding_constraint(out, P(("data", "fsdp"))), None

    def loss(params, x):
        x, _ = jax.lax.scan(layer, x, params)
        return jnp.sum(x.astype(jnp.float32))

    def shape(sizes, *spec):
        sharding = NamedSharding(mesh, P(*spec))
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=sharding)

    params = (
        shape((4, 4096, 16384), None, "fsdp", "tensor"),
        shape((4, 16384, 4096), None, "tensor", "fsdp"),
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    x = shape((16, 1024, 4096), ("data", "fsdp"))
    return jax.jit(jax.grad(loss), out_shardings=shardings).trace(params, x)


def stripped(text: str) -> str:
    """A program less the tables before it, most layouts, and metadata and notes that nothing
    reads.
    """
    lines = []
    for line in text[text.index("\n%") :].splitlines():
        line, _, note = line.partition(", backend_config=")
        if "channel_id" not in line and "kind=kCustom" not in line:
            line = re.sub(r", metadata=\{[^}]*\}", "", line)
            line = re.sub(r"\]\{[^}]*\}", "]", line)
        found = [re.search(read, note) for read in READ]
        kept = [match[0] for match in found if match]
        if kept:
            line += ", backend_config={" + ",".join(kept) + "}"
        lines.append(re.sub(r" stack_frame_id=\d+", "", line))
    return "\n".join([text.split(",", 1)[0], *lines]) + "\n"


def main() -> None:
    """Compiles and writes all of them."""
    cases = {
        "exchanges_cpu": (exchanges, EXCHANGES, None, {}),
        "exchanges_v5p": (exchanges, EXCHANGES, "v5p:2x2x2", {}),
        "layers_v5p": (layers, LAYERS, "v5p:2x2x2", SPREAD),
        "layers_tpu7x": (layers, LAYERS_OF_16, "tpu7x:2x2x2", {}),
    }
    PROGRAMS.mkdir(exist_ok=True)
    for name, (function, sizes, topology, options) in cases.items():
        devices = tpu_devices(topology) if topology else None
        mesh = make_mesh(sizes, devices)
        with jax.set_mesh(mesh):
            lowered = function(mesh).lower(lowering_platforms=("tpu" if topology else "cpu",))
        compiled = lowered.compile(compiler_options=options or None)
        (PROGRAMS / f"{name}.hlo").write_text(stripped(compiled.as_text()))


if __name__ == "__main__":
    main()
