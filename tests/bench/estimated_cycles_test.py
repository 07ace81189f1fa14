"""Estimates of cycles are added up as often as a program runs its instructions."""

import pytest

from research.bench.estimated_cycles import Cycles, estimated_cycles

# A loop over tiles, of which an argument says how many there are, around one over four layers, as
# the TPU compiler prints them.
PROGRAM = """
%layer_cond (a: (s32[], f32[8])) -> pred[] {{
  %a = (s32[], f32[8]) parameter(0)
  %layers = s32[] constant(4)
  %i = s32[] get-tuple-element(%a), index=0
  ROOT %lt = pred[] compare(%i, %layers), direction={direction}
}}

%fused (b: f32[8]) -> f32[8] {{
  %b = f32[8] parameter(0)
  ROOT %inside = f32[8] negate(%b), backend_config={{"window_config":{{"estimated_cycles":"5000"}}}}
}}

%layer (c: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %c = (s32[], f32[8]) parameter(0)
  %one = s32[] constant(1)
  %j = s32[] get-tuple-element(%c), index=0
  %x = f32[8] get-tuple-element(%c), index=1
  %next = s32[] add(%j, %one)
  %y = f32[8] fusion(%x), calls=%fused, backend_config={{"window_config":{{{estimate}}}}}
  %toy.3 = f32[8] custom-call(%y), custom_call_target="tpu_custom_call"
  ROOT %t = (s32[], f32[8]) tuple(%next, %toy.3)
}}

%tile_cond (d: (s32[], f32[8], s32[])) -> pred[] {{
  %d = (s32[], f32[8], s32[]) parameter(0)
  %k = s32[] get-tuple-element(%d), index=0
  %tiles = s32[] get-tuple-element(%d), index=2
  ROOT %less = pred[] compare(%k, %tiles), direction=LT
}}

%few (e: f32[8]) -> f32[8] {{
  %e = f32[8] parameter(0)
  ROOT %copy.1 = f32[8] copy(%e), backend_config={{"estimated_cycles":"3"}}
}}

%many (f: f32[8]) -> f32[8] {{
  %f = f32[8] parameter(0)
  ROOT %copy.2 = f32[8] copy(%f), backend_config={{"estimated_cycles":"20"}}
}}

%tile (g: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {{
  %g = (s32[], f32[8], s32[]) parameter(0)
  %uno = s32[] constant(1)
  %zero = s32[] constant(0)
  %is = pred[] constant(true)
  %m = s32[] get-tuple-element(%g), index=0
  %z = f32[8] get-tuple-element(%g), index=1
  %n = s32[] get-tuple-element(%g), index=2
  %after = s32[] add(%m, %uno)
  %begun = (s32[], f32[8]) tuple(%zero, %z)
  %run = (s32[], f32[8]) while(%begun), condition=%layer_cond, body=%layer
  %w = f32[8] get-tuple-element(%run), index=1
  %v = f32[8] conditional(%is, %w, %w), true_computation=%few, false_computation=%many
  ROOT %u = (s32[], f32[8], s32[]) tuple(%after, %v, %n)
}}

ENTRY %main (p: f32[8], q: s32[]) -> f32[8] {{
  %p = f32[8] parameter(0)
  %q = s32[] parameter(1)
  %nought = s32[] constant(0)
  %first = f32[8] copy(%p), backend_config={{"estimated_cycles":"100"}}
  %init = (s32[], f32[8], s32[]) tuple(%nought, %first, %q)
  %while = (s32[], f32[8], s32[]) while(%init), condition=%tile_cond, body=%tile
  ROOT %out = f32[8] get-tuple-element(%while), index=1
}}
"""
PLAIN = {"direction": "LT", "estimate": '"estimated_cycles":"1000"'}


@pytest.mark.parametrize("tiles", [0, 1, 3])
def test_an_instruction_counts_as_often_as_the_loops_around_it_run(tiles: int):
    found = estimated_cycles(PROGRAM.format(**PLAIN), tiles)
    assert found == Cycles(100 + tiles * (4 * 1000 + 20), {"toy": 4 * tiles})


def test_what_has_no_estimate_is_named():
    found = estimated_cycles(PROGRAM.format(**PLAIN | {"estimate": ""}), 1)
    assert found == Cycles(100 + 20, {"y": 4, "toy": 4})


def test_a_program_without_estimates_is_refused():
    text = PROGRAM.format(**PLAIN).replace("estimated_cycles", "others")
    with pytest.raises(ValueError, match="has an estimate"):
        estimated_cycles(text, 1)


def test_several_loops_of_unknown_turns_are_refused():
    with pytest.raises(ValueError, match="run, while do not say"):
        estimated_cycles(PROGRAM.format(**PLAIN | {"direction": "NE"}), 1)
