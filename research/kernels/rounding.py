"""Sizes in whole units."""


def round_up(size: int, unit: int) -> int:
    """Returns the least multiple of `unit` that is not below `size`."""
    return -(-size // unit) * unit
