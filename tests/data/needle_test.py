"""Documents with needles: each is hidden once and asked for once, and nothing else tells it."""

import re

import pytest

from research.core.errors import UserError
from research.data import needle
from research.data.corpus import SPLITS
from research.data.source_config import SourceConfig
from research.data.source_stats import fingerprint
from research.data.sources import documents

LENGTH = 300
LINE = re.compile(r"\n\[([A-Z])([A-Z]{3})\]\n")


def needles_of(document: str) -> list[tuple[str, str]]:
    return LINE.findall(document)


def test_every_needle_is_hidden_once_and_some_are_asked_for_once_at_the_end():
    count = needle.NUM_NEEDLES
    values = []
    orders = []
    counts = []
    for document in needle.documents(40, LENGTH):
        assert len(document.encode()) == LENGTH
        needles = needles_of(document)
        hidden, asked = needles[:count], needles[count:]
        assert len(set(asked)) == len(asked)
        assert set(asked) <= set(hidden)
        counts.append(len(asked))
        # No letter occurs twice, and so what follows one tells what follows it again.
        letters = "".join(key + value for key, value in hidden)
        assert len(set(letters)) == len(letters) == count * 4
        # All questions are after the text.
        assert document.endswith("".join(needle.Needle(*each).line for each in asked))
        values += [value for _, value in hidden]
        orders.append(hidden[: len(asked)] == asked)
    assert set(counts) == {1, 2, 3}
    # Neither the order nor another document tells a value: of 15,600 values 120 are drawn.
    assert 0 < sum(orders) < 25
    assert len(set(values)) > 0.95 * len(values)


def test_one_needle_in_eight_lies_at_the_end_of_the_text():
    count = needle.NUM_NEEDLES
    at_end = 0
    for document in needle.documents(400, LENGTH):
        asked = len(needles_of(document)) - count
        text = document[: -asked * needle.LINE_LENGTH]
        at_end += len(re.findall(r"(?:\n\[[A-Z]{4}\]\n)+$", text))
    # Of three needles, one at least: 1 - (7/8)³ = 0.33
    assert 0.25 < at_end / 400 < 0.42


def test_prepared_needles_are_those_of_the_code(monkeypatch: pytest.MonkeyPatch):
    config = SourceConfig(kind="needle", length=LENGTH, documents=5)
    before = fingerprint(config)
    assert fingerprint(config) == before
    monkeypatch.setattr(needle, "NOISE", needle.NOISE.upper())
    assert fingerprint(config) != before


def test_needles_lie_at_their_depths():
    needles = [needle.Needle("AAA", "111"), needle.Needle("BBB", "222")]
    hidden = needle.hide("x" * 100, needles, [0.75, 0.2])
    assert hidden == "x" * 20 + needles[1].line + "x" * 55 + needles[0].line + "x" * 25
    assert needle.hide("xy", needles[:1], [0.0]) == needles[0].line + "xy"
    assert needle.hide("xy", needles[:1], [1.0]) == "xy" + needles[0].line


def test_no_document_is_trained_on_and_held_out():
    config = SourceConfig(kind="needle", length=LENGTH, documents=200, heldout_fraction=0.3)
    train, heldout = ([each.text for each in documents(config, split)] for split in SPLITS)
    assert len(train) + len(heldout) == 200
    assert 30 < len(heldout) < 90
    assert not set(train) & set(heldout)
    # Every pass has the same ones.
    assert train == [each.text for each in documents(config, "train")]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "needle"}, f"length = 0 must be at least {needle.OVERHEAD + 1} for kind"),
        ({"kind": "needle", "length": 300}, "documents = 0 must be at least 1 for kind"),
        ({"kind": "stdlib", "length": 300}, "length = 300 must be 0 for kind = 'stdlib'."),
        ({"kind": "needle", "length": 300, "path": "a"}, "path = 'a' must be empty for kind"),
    ],
)
def test_a_length_belongs_to_needles(fields, message: str):
    with pytest.raises(UserError) as caught:
        SourceConfig(**fields)
    assert str(caught.value).startswith(message)
