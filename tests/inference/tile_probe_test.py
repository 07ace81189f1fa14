"""Tiles that compute otherwise are found, in 16 bits also those that rarely show it."""

from research.inference.tile_probe import NARROW_BYTES, alike_tiles

PAGE = 2**13


def probe(other):
    """Returns tiles of which those in `other` differ, where the draw and the padding say so."""
    calls = []

    def run(draw: int, tile: int, skipped: int) -> list[bytes]:
        calls.append((draw, tile, skipped))
        differs = tile in other and other[tile](draw, skipped)
        return [b"logprobs", bytes(PAGE - 1) + bytes([draw, differs])]

    return run, calls


def test_tiles_of_equal_numbers_are_alike_and_others_are_left_out():
    run, calls = probe({2: lambda draw, skipped: skipped == 0})
    assert alike_tiles((2, 8, 16), run, is_narrow=False) == (8, 16)
    run, _ = probe({8: lambda draw, skipped: skipped > 0})
    assert alike_tiles((2, 8, 16), run, is_narrow=False) == (2, 16)
    # Of the largest tile too.
    run, calls = probe({16: lambda draw, skipped: skipped > 0})
    assert alike_tiles((2, 8, 16), run, is_narrow=False) == (2, 8)
    run, _ = probe(dict.fromkeys((2, 8, 16), lambda draw, skipped: skipped > 0))
    assert alike_tiles((2, 8, 16), run, is_narrow=True) == ()
    assert calls == [(0, tile, skipped) for tile in (2, 8, 16) for skipped in (0, tile // 2)]


def test_in_16_bits_tokens_are_drawn_until_a_rare_difference_shows():
    draws = NARROW_BYTES // PAGE
    late = {2: lambda draw, skipped: draw == draws - 1}
    run, calls = probe(late)
    assert alike_tiles((2, 8, 16), run, is_narrow=True) == (8, 16)
    assert {draw for draw, _, _ in calls} == set(range(draws))
    # The control: one draw does not see it.
    run, _ = probe(late)
    assert alike_tiles((2, 8, 16), run, is_narrow=False) == (2, 8, 16)
    # A tile that is alone is not compared any more.
    run, calls = probe({2: lambda *_: True, 8: lambda *_: True})
    assert alike_tiles((2, 8, 16), run, is_narrow=True) == (16,)
    assert {draw for draw, _, _ in calls} == {0}
