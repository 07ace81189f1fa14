"""Programs are compiled for chips that are not here."""

import importlib.util
import warnings

import jax
import jax.numpy as jnp
import pytest

from research.core.errors import UserError
from research.parallel.target import chip, platform
from research.scaling.topology import TPU_TOPOLOGIES, compile_on, gpu_devices, tpu_devices
from tests.tiers import rest_in


@pytest.fixture
def libtpu():
    pytest.importorskip("libtpu", reason="needs the extra `tpu`")


@pytest.mark.parametrize("generation", rest_in("compilers", TPU_TOPOLOGIES, "v5e"))
def test_a_matmul_is_compiled_for_a_tpu_that_is_not_here(libtpu, generation):
    seen = []

    def program(x):
        seen.append((platform(), chip()))
        return x @ x

    device = tpu_devices(generation)[0]
    compiled = compile_on(device, program, jax.ShapeDtypeStruct((256, 256), jnp.bfloat16))
    assert seen == [("tpu", device.device_kind)]
    assert compiled.memory_analysis().output_size_in_bytes == 256 * 256 * 2
    assert platform() == jax.default_backend()


def test_a_function_is_traced_anew_for_each_chip(libtpu):
    seen = []

    def program(x):
        seen.append(chip())
        return x + 1

    devices = [tpu_devices(generation)[0] for generation in ("v4", "v6e")]
    for device in devices:
        compile_on(device, program, jax.ShapeDtypeStruct((8, 128), jnp.float32))
    assert seen == [device.device_kind for device in devices]


@pytest.mark.compilers
def test_a_matmul_is_compiled_for_an_h200_that_is_not_here():
    pytest.importorskip("jax_cuda12_plugin", reason="needs the extra `cuda`")
    compiled = compile_on(
        gpu_devices()[0], lambda x: x @ x, jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)
    )
    assert "__cublas" in compiled.as_text() or "triton" in compiled.as_text()


def test_a_program_that_no_cache_can_load_is_no_warning(libtpu):
    entry = "Error reading persistent compilation cache entry for 'jit_step': "
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tpu_devices("v5e")
        warnings.warn(f"{entry}PjRtCompiler must be constructed with a Client", stacklevel=1)
        warnings.warn(f"{entry}the file is damaged", stacklevel=1)
    # The control: what a user can act on is said.
    assert [str(each.message) for each in caught] == [f"{entry}the file is damaged"]


def test_an_unknown_topology_is_one_line(libtpu):
    with pytest.raises(
        UserError, match=r"topology = 'v5' is no TPU generation. Did you mean 'v5[ep]'"
    ):
        tpu_devices("v5")
    with pytest.raises(UserError, match=r"topology = 'v5e:3x5' does not exist for tpu: ") as caught:
        tpu_devices("v5e:3x5")
    assert "\n" not in str(caught.value)


def test_a_missing_compiler_names_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -c constraints.txt -e '.\[tpu\]'"):
        tpu_devices("v5e")
    with pytest.raises(UserError, match=r"pip install -c constraints.txt -e '.\[cuda\]'"):
        gpu_devices()
