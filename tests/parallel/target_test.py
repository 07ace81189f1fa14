"""A program is traced for the devices of its mesh, whatever this machine is."""

import jax
import pytest

from research.core.trees import named_leaves
from research.optim.optimizers import OptimConfig
from research.optim.schedules import ScheduleConfig
from research.parallel.mesh import make_mesh
from research.parallel.mesh_config import MeshConfig
from research.parallel.target import chip, compiling_for, mesh_platform, platform
from research.scaling.topology import tpu_devices
from research.training.config import TrainConfig
from research.training.language_model import language_model_program
from research.training.program import Program
from tests.tiny import tiny_config


def program_on(devices: list) -> Program:
    optim = OptimConfig(schedule=ScheduleConfig(name="constant"))
    train = TrainConfig(steps=1, batch_size=8, sequence_length=16)
    return language_model_program(tiny_config(), optim, train, MeshConfig(), devices)


def test_the_mesh_in_context_says_which_platform_it_is():
    pytest.importorskip("libtpu", reason="needs the extra `tpu`")
    mesh = make_mesh(MeshConfig(), tpu_devices("v5e"))
    assert mesh_platform(mesh) == "tpu"
    with jax.set_mesh(mesh):
        assert (platform(), chip()) == ("tpu", "TPU v5 lite")
        with compiling_for("gpu", "NVIDIA H200"):
            assert (platform(), chip()) == ("gpu", "NVIDIA H200")
    with jax.set_mesh(make_mesh(MeshConfig())):
        assert (platform(), chip()) == ("cpu", "cpu")
    assert platform() == jax.default_backend()


def test_a_program_for_tpus_has_their_kernels_and_their_layer_loop_on_a_machine_without_one():
    pytest.importorskip("libtpu", reason="needs the extra `tpu`")

    def kernels(program: Program) -> tuple[int, int]:
        with jax.set_mesh(program.mesh):
            jaxpr = str(jax.jit(program.train_step).trace(*arguments(program)).jaxpr)
        return jaxpr.count("pallas_call["), jaxpr.count("= scan[")

    there = program_on(tpu_devices("v5e"))
    assert "layers/mlp/up/kernel" in named_leaves(there.state.params)
    calls, loops = kernels(there)
    assert calls > 0
    assert loops > 0
    # The control: the same configs on this machine.
    here = program_on(jax.devices()[:4])
    assert "layers_0/mlp/up/kernel" in named_leaves(here.state.params)
    assert kernels(here)[0] == 0


def arguments(program: Program) -> tuple:
    return (program.state, program.frozen, program.batch)
