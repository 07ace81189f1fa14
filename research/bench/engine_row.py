"""A row of `tessera bench engine`."""

from typing import NamedTuple

COLUMNS = ["what", "measured", "beside", "ratio", "wanted", "also"]


class Row(NamedTuple):
    """What is printed of a measurement; `COLUMNS`."""

    what: str
    measured: str
    beside: str
    ratio: str
    wanted: str
    also: str
