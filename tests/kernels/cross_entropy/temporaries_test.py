"""Cross-entropy at the size of a large model: its temporaries, by each compiler."""

import jax
import jax.numpy as jnp
import pytest

from research.kernels.cross_entropy import cross_entropy
from research.scaling.topology import compile_on, tpu_devices
from tests.kernels.cross_entropy.cases import with_z_loss

TOKENS, VOCABULARY = 8192, 128_256


def temporaries(device, width, dtype, implementation="auto"):
    """Returns the bytes of the gradient's temporaries at the size of a large model, as a share of
    float32 logits.
    """

    def loss(hidden, kernel, targets, weights):
        options = {"label_smoothing": 0.1, "implementation": implementation}
        return cross_entropy(with_z_loss, hidden, kernel, targets, weights, **options)[0]

    shapes = (
        ((TOKENS, width), dtype),
        ((width, VOCABULARY), jnp.float32),
        ((TOKENS,), jnp.int32),
        ((TOKENS,), jnp.float32),
    )
    arguments = (jax.ShapeDtypeStruct(*shape) for shape in shapes)
    compiled = compile_on(device, jax.grad(loss, argnums=(0, 1)), *arguments)
    return compiled.memory_analysis().temp_size_in_bytes / (4 * TOKENS * VOCABULARY)


@pytest.mark.fast_cases(
    *(f"{name}-512-{dtype}" for name in ("fused", "chunked") for dtype in ("float32", "bfloat16"))
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [512, 1024])
@pytest.mark.parametrize("implementation", ["fused", "chunked"])
def test_temporaries_are_under_a_twentieth_of_the_logits(implementation, width, dtype):
    assert temporaries(jax.devices()[0], width, dtype, implementation) < 0.05


@pytest.mark.compilers
def test_temporaries_are_as_small_on_tpu():
    pytest.importorskip("libtpu", reason="needs the extra `tpu`")
    # Of the generations the one that takes the most.
    assert temporaries(tpu_devices("v5p")[0], 1024, jnp.bfloat16) < 0.05


@pytest.mark.compilers
def test_temporaries_are_as_small_on_gpu(h200):
    assert temporaries(h200, 1024, jnp.bfloat16) < 0.05
