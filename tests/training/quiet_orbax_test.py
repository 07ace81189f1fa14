"""Orbax is silent about a write that failed, and nothing stays replaced: claims about
`training.quiet_orbax`.
"""

import logging
import sys

import pytest

from research.core.errors import UserError
from research.training import quiet_orbax
from research.training.checkpoints import CheckpointConfig, Checkpoints
from tests.training.states import new_state


def _replaced():
    return sys.unraisablehook, *(
        tuple(logging.getLogger(name).filters) for name in ("absl", "asyncio")
    )


def test_hooks_are_put_back_where_a_write_raises():
    before = _replaced()

    def write():
        with quiet_orbax.silenced(), quiet_orbax.silenced():
            assert all(now != old for now, old in zip(_replaced(), before, strict=True))
            raise OSError("the disk broke")

    with pytest.raises(OSError, match="the disk broke"):
        write()
    assert _replaced() == before


def _refused(checkpoints, monkeypatch):
    checkpoints.save(1, new_state(), {"set": {1}})


def _failed(checkpoints, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints._checkpointer._handler, "finalize", full)
    checkpoints.save(1, new_state(), {})
    checkpoints.wait()


@pytest.mark.parametrize("save", [_refused, _failed])
def test_after_a_save_that_failed_nothing_stays_replaced(tmp_path, monkeypatch, save):
    before, checkpoints = _replaced(), Checkpoints(tmp_path, CheckpointConfig())
    with pytest.raises(UserError):
        save(checkpoints, monkeypatch)
    checkpoints.close()
    assert _replaced() == before
