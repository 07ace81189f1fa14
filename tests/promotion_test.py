"""In tests no array changes its type or its rank without a word in the code."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

MIXES = {
    "types": (jnp.ones(3, jnp.bfloat16), jnp.ones(3, jnp.float32)),
    "kinds": (jnp.ones(3, jnp.int32), jnp.ones(3, jnp.float32)),
    "ranks": (jnp.ones((2, 3)), jnp.ones(3)),
}


@pytest.mark.parametrize("name", MIXES)
def test_a_mix_raises(name: str):
    left, right = MIXES[name]
    with pytest.raises(ValueError, match="promotion"):
        left + right
    with pytest.raises(ValueError, match="promotion"):
        jax.jit(jnp.multiply)(left, right)


def test_a_number_of_python_mixes_with_any_array():
    assert (jnp.ones((2, 3), jnp.bfloat16) * 2.5).dtype == jnp.bfloat16


@pytest.mark.processes
def test_a_process_that_a_test_starts_raises_too():
    mix = "import jax.numpy as jnp; jnp.ones(3, jnp.bfloat16) + jnp.ones(3)"
    done = subprocess.run([sys.executable, "-c", mix], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "TypePromotionError" in done.stderr
