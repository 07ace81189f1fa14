"""Tiles that compute otherwise are found, in 16 bits also those that rarely show it."""

import jax

from research.data.tokenizers import ByteTokenizer
from research.inference.engine import Engine
from research.inference.runner import Runner
from research.inference.serve_config import ServeConfig
from research.inference.tile_probe import NARROW_BYTES, alike_tiles
from tests.tiny import random_params, tiny_config

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


def test_a_tile_whose_pages_alone_differ_is_left_out(monkeypatch):
    config = tiny_config(vocab_size=260, max_length=64)
    params = random_params(config)
    serve = ServeConfig(slots=2, tokens=64, rows=8, tiles=(2, 8))
    begin = Runner._read

    def other(self, arrays, count, tile, tables):
        begin(self, arrays, count, tile, tables)
        if tile == 2:
            # The last slot of page 1 in the last layer, which no token of the probe sees.
            last = self.state.layers[-1]
            tokens = jax.tree.map(lambda leaf: leaf.at[..., 1, 0, -1, 0].add(1), last.tokens)
            changed = last.replace(tokens=tokens)
            self.state = self.state.replace(layers=(*self.state.layers[:-1], changed))

    assert Engine(config, params, ByteTokenizer(), serve).replicas[0]._runner._tiles == (2, 8)
    monkeypatch.setattr(Runner, "_read", other)
    assert Engine(config, params, ByteTokenizer(), serve).replicas[0]._runner._tiles == (8,)
