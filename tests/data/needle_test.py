"""Documents with needles: each is hidden once and asked for once, and nothing else tells it."""

import re

import pytest

from research.core.errors import UserError
from research.data import needle, stdlib
from research.data.source_config import SourceConfig
from research.data.sources import documents

LENGTH = 300
# Three bytes a sign, so that bytes are not characters.
TEXT = "The cat sat on the mat — and slept. " * 60
TEXTS = [(f"{index}.py", f"{index}.py", f"# {index}\n{TEXT}") for index in range(40)]
LINE = re.compile(r"\n\[([A-Z0-9]{3})([A-Z0-9]{3})\]\n")


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdlib, "texts", lambda skip: iter(TEXTS))


def needles_of(document: str) -> list[tuple[str, str]]:
    return LINE.findall(document)


def test_every_needle_is_hidden_once_and_asked_for_once_at_the_end():
    found = list(needle.documents("a", TEXT, LENGTH))
    assert len(found) == len(TEXT.encode()) // (LENGTH - needle.OVERHEAD)
    orders = []
    for document in found:
        assert len(document.encode()) <= LENGTH
        needles = needles_of(document)
        hidden, asked = needles[: needle.NUM_NEEDLES], needles[needle.NUM_NEEDLES :]
        assert sorted(hidden) == sorted(asked)
        assert len({key for key, _ in hidden}) == needle.NUM_NEEDLES
        # All questions are behind the text.
        questions = "".join(needle.Needle(*each).line for each in asked)
        assert document.endswith(questions)
        orders.append(hidden == asked)
    # The order of the questions does not tell which needle is meant.
    assert not all(orders)
    values = [value for document in found for _, value in needles_of(document)]
    assert len(set(values)) > 0.45 * len(values)


def test_needles_lie_at_their_depths():
    needles = [needle.Needle("AAA", "111"), needle.Needle("BBB", "222")]
    hidden = needle.hide("x" * 100, needles, [0.75, 0.2])
    assert hidden == "x" * 20 + needles[1].line + "x" * 55 + needles[0].line + "x" * 25
    assert needle.hide("xy", needles[:1], [0.0]) == needles[0].line + "xy"
    assert needle.hide("xy", needles[:1], [1.0]) == "xy" + needles[0].line


def test_held_out_documents_hide_needles_in_held_out_text(texts: None):
    config = SourceConfig(kind="needle", length=LENGTH, heldout_fraction=0.3)
    plain = SourceConfig(heldout_fraction=0.3)
    for split in ("train", "heldout"):
        names = {document.name.partition(":")[0] for document in documents(config, split)}
        assert names == {document.name for document in documents(plain, split)}
        assert names


def test_documents_are_the_same_in_every_pass(texts: None):
    config = SourceConfig(kind="needle", length=LENGTH)
    assert list(documents(config, "train")) == list(documents(config, "train"))
    first = next(needle.documents("a", TEXT, LENGTH))
    assert first != next(needle.documents("b", TEXT, LENGTH))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "needle"}, f"length = 0 must be at least {needle.OVERHEAD + 1} for kind"),
        ({"kind": "stdlib", "length": 300}, "length = 300 must be 0 for kind = 'stdlib'."),
        ({"kind": "needle", "length": 300, "path": "a"}, "path = 'a' must be empty for kind"),
    ],
)
def test_a_length_belongs_to_needles(fields, message: str):
    with pytest.raises(UserError) as caught:
        SourceConfig(**fields)
    assert str(caught.value).startswith(message)
