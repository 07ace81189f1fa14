"""A course that cannot be run is refused by name."""

import pytest

from research.core.errors import UserError
from research.training.config import TrainConfig


@pytest.mark.parametrize(
    ("field", "value", "constraint"),
    [
        ("steps", 0, "must be at least 1."),
        ("batch_size", 0, "must be at least 1."),
        ("accumulation", 3, "does not divide batch_size = 16. Use 2 or 4."),
        ("z_loss", -0.1, "must not be below 0."),
        ("label_smoothing", 1.0, "must lie in [0, 1)."),
        ("eval_every", -1, "must not be below 0."),
        ("seed", -1, "must lie in [0, 2147483648)."),
        ("seed", 2**31, "must lie in [0, 2147483648)."),
    ],
)
def test_impossible_value_is_refused(field: str, value: float, constraint: str):
    with pytest.raises(UserError) as caught:
        TrainConfig(**{"steps": 10, field: value})
    assert str(caught.value) == f"{field} = {value} {constraint}"
