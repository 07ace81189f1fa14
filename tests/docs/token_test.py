"""The way of a token names files that exist, and can be read in a day."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
MOST_LINES = 8000


def files() -> list[pathlib.Path]:
    text = (ROOT / "docs" / "token.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return [ROOT / "research" / name for row in rows for name in re.findall(r"`([^`]+\.py)`", row)]


def test_the_way_of_a_token_is_short_enough():
    assert len(files()) > 30
    lines = [line for path in files() for line in path.read_text().splitlines()]
    assert sum(bool(line.strip()) for line in lines) < MOST_LINES
