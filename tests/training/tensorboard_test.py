"""What TensorBoard is told does not depend on the system's clock, and costs no run its end."""

import pathlib
import threading
import time

import pytest
from tensorboardX.proto.event_pb2 import Event

from research.training.tensorboard import Board

DAY = 86_400.0


def scalars(folder: pathlib.Path) -> list[tuple[int, str, float]]:
    """The numbers of the folder's one event file, whose records are: length (8 bytes), check (4),
    event, check (4).
    """
    [path] = folder.iterdir()
    data, found = path.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    return found


@pytest.mark.parametrize("days", [-60, -1, 1, 60])
def test_a_clock_that_jumps_by_days_changes_nothing(tmp_path, monkeypatch, days):
    before = threading.active_count()
    board = Board(tmp_path, 0)
    board.write(1, {"loss": 1.0})
    true = time.time
    monkeypatch.setattr(time, "time", lambda: true() + days * DAY)
    for step in range(2, 40):
        board.write(step, {"loss": float(step)})
    assert threading.active_count() == before  # nobody who might die, or be waited for
    board.close()
    assert scalars(tmp_path) == [(step, "loss", float(step)) for step in range(1, 40)]


def test_a_full_disk_is_one_warning(tmp_path, monkeypatch, caplog):
    board = Board(tmp_path, 0)

    def full(event: Event) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(board._writer, "write_event", full)
    board.write(1, {"loss": 1.0})
    board.write(2, {"loss": 1.0})
    board.close()
    assert (
        caplog.text.count("TensorBoard gets no more numbers: [Errno 28] No space left on device")
        == 1
    )
