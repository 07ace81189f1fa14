"""Sides of a bench: who is asked when, and what is said when one of them ends before it answers."""

import pytest

from research.bench import sides
from research.core.errors import UserError

# A side that answers one round, and is killed in the next one, as the system does when memory
# ends.
KILLED = """
import os, signal
from research.bench.sides import serve
calls = []
def take():
    calls.append(len(calls))
    if len(calls) > 1: os.kill(os.getpid(), signal.SIGKILL)
serve(take)
"""


def test_each_round_has_the_other_order_and_the_first_is_not_counted():
    asked = []
    found = sides.interleave_calls(
        {side: lambda side=side: asked.append(side) or len(asked) for side in "ab"}, 2
    )
    assert asked == ["a", "b", "b", "a", "a", "b"]
    assert found == {"a": [4, 5], "b": [3, 6]}


def test_a_side_that_is_killed_is_named_in_one_line(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    said = "the side `killed now` was killed by SIGKILL"
    with sides.worker(["killed", "now"], tmp_path) as ask:
        assert ask(1) >= 0
        with pytest.raises(UserError, match=f"^{said}"):
            ask(1)
        # Its pipe is closed by now, which is no reason to end without a word.
        with pytest.raises(UserError, match=f"^{said}"):
            ask(1)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("sys.exit(3)", "ended with status 3"),
        ("os.kill(os.getpid(), signal.SIGTERM)", "was killed by SIGTERM"),
    ],
)
def test_a_side_that_runs_to_its_end_is_named_if_it_fails(code, said, tmp_path):
    (tmp_path / "failing.py").write_text(f"import os, signal, sys; print('some'); {code}")
    with pytest.raises(UserError, match=f"^the side `failing a` {said}"):
        sides.run(["failing", "a"], tmp_path)
