import pathlib

import pytest

from research.training.checkpoints import CheckpointConfig, Checkpoints


@pytest.fixture
def opened(tmp_path):
    """Opens the checkpoints of a workdir; closes them after the test."""
    made = []

    def open_(workdir: pathlib.Path = tmp_path, frozen=(), **config) -> Checkpoints:
        made.append(Checkpoints(workdir, CheckpointConfig(**config), frozen))
        return made[-1]

    yield open_
    for checkpoints in made:
        checkpoints.close()
