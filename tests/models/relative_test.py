"""The shift of scores by distance, against plain loops: claims about `models.relative`."""

import jax.numpy as jnp
import numpy as np
import pytest

from research.models.relative import relative_shift


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("both_sides", [False, True])
def test_shift_puts_each_distance_at_its_key(length, both_sides):
    distances = np.arange(length - 1, -length if both_sides else -1, -1)
    scores = np.broadcast_to(distances, (2, 3, length, len(distances)))
    shifted = np.asarray(relative_shift(jnp.asarray(scores, jnp.float32)))
    assert shifted.shape == (2, 3, length, length)
    for query in range(length):
        for key in range(length if both_sides else query + 1):
            assert (shifted[:, :, query, key] == query - key).all()
