"""Sizes in whole units."""


def round_up(size: int, unit: int) -> int:
    """Returns the least multiple of `unit` that is not below `size`."""
    # 10 in units of 4: 3 units, 12
    units = -(-size // unit)
    return units * unit
