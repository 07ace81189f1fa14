"""Loading a model takes hardly more memory than what is served: claims about `checkpoint_shards`,
measured with `bench.engine_load`, and about that bench.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import types

import jax.numpy as jnp
import psutil
import pytest

from research.bench import engine_load
from research.bench.engine_load import MODELS, MOST_MEMORY, Reading, rows_of, write_model
from research.core.trees import nested
from research.interop import mapping
from research.training.checkpoints import CheckpointConfig, Checkpoints

# The way that the control takes: all in float32, then as it is served.
WHOLE = """
import contextlib, dataclasses, sys
import jax, jax.numpy as jnp
from research.bench import engine_load
from research.models.language_model import abstract_params
from research.training.checkpoints import CheckpointConfig, Checkpoints

def load(workdir, config, dtype):
    stored = abstract_params(config, "cpu")
    with contextlib.closing(Checkpoints(workdir, CheckpointConfig())) as checkpoints:
        _, params = checkpoints.restore_params(stored)
    return jax.block_until_ready(jax.tree.map(lambda leaf: leaf.astype(dtype), params))

engine_load.load = load
engine_load.main(*sys.argv[1:])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of 580 MB, as a conversion writes it and as training does, and a tiny one."""
    folder = tmp_path_factory.mktemp("loaded")
    write_model(folder / "tiny", MODELS["tiny"])
    write_model(folder / "converted", MODELS["145 M"])
    shapes = mapping.unrolled_shapes(MODELS["145 M"])
    params = {name: jnp.ones(shape.shape, shape.dtype) for name, shape in shapes.items()}
    config = CheckpointConfig(asynchronous=False)
    with contextlib.closing(Checkpoints(folder / "trained", config)) as checkpoints:
        checkpoints.save(1, {"params": nested(params)}, {})
    return folder


def memory_ratio(folder, name, dtype, command) -> float:
    arguments = ["load", "145 M", str(folder / name), dtype, str(folder / "tiny")]
    # One arena of the C library: how many there are goes by the machine's load, and each keeps what
    # was freed in it.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, *command, *arguments]
    printed = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=environment
    ).stdout
    reading = Reading(**json.loads(printed))
    itemsize = 2 if dtype == "bfloat16" else 4
    assert reading.served == itemsize * engine_load.num_elements(MODELS["145 M"])
    return reading.peak / reading.served


@pytest.mark.processes
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("converted", "bfloat16"), ("trained", "bfloat16"), ("converted", "float32")],
)
def test_loading_takes_hardly_more_memory_than_is_served(folder, name, dtype):
    assert memory_ratio(folder, name, dtype, ["-m", engine_load.SIDE]) < MOST_MEMORY


@pytest.mark.processes
def test_loading_all_in_float32_first_takes_more(folder):  # the control
    assert memory_ratio(folder, "converted", "bfloat16", ["-c", WHOLE]) > 2


def test_rates_are_those_of_the_disk_and_memory_is_that_of_what_is_served():
    # 100 bytes in 4 s, beside 2 s; 60 bytes more than before for 50 that are served.
    load = Reading(seconds=4.0, stored=100, from_disk=90, served=50, peak=60)
    read = Reading(seconds=2.0, stored=100, from_disk=100, served=0, peak=5)
    rate, memory = rows_of("1 B", "bfloat16", {"load": [load], "read": [read]})
    assert (rate.ratio, rate.wanted) == ("0.500", "at least 0.7")
    assert "at least 90% came from the disk" in rate.also
    assert (memory.ratio, memory.wanted) == ("1.20", "at most 1.15")


@pytest.mark.processes
def test_a_model_is_written_loaded_and_compared_with_its_disk(tmp_path):
    rows = list(engine_load.load_rows("tiny", tmp_path, 1))
    assert [row.what.partition(",")[0] for row in rows] == ["loading tiny"] * 4
    assert all(row.ratio for row in rows)


@pytest.mark.parametrize(
    ("what", "said"), [("disk", "the disk has 0.0 GB"), ("memory", "the memory has 0.0 GB")]
)
def test_what_has_no_room_is_left_out_by_name(tmp_path, monkeypatch, what, said):
    none = types.SimpleNamespace(free=0, available=0)
    owner, name = {"disk": (shutil, "disk_usage"), "memory": (psutil, "virtual_memory")}[what]
    monkeypatch.setattr(owner, name, lambda *_: none)
    rows = list(engine_load.load_rows("1 B", tmp_path, 1))
    assert [row.beside for row in rows] == ["left out"] * 2
    assert all(said in row.also for row in rows)
