"""How often loops run, as XLA notes it and as the counter says."""

import pytest

from research.scaling.hlo import parse_module
from research.scaling.loop_trips import trip_count

# A loop as the TPU compiler leaves it: the counter starts at a copy of a constant, and its step may
# be an element that the loop carries along.
LOOP = """
%cond (p: (s32[], f32[8], s32[])) -> pred[] {{
  %limit = s32[] constant({limit})
  %p = (s32[], f32[8], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %bound = s32[] get-tuple-element(%p), index=2
  ROOT %lt = pred[] compare({compared}), direction={direction}
}}

%body (q: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {{
  %q = (s32[], f32[8], s32[]) parameter(0)
  %one = s32[] constant({step})
  %j = s32[] get-tuple-element(%q), index=0
  %x = f32[8] get-tuple-element(%q), index=1
  %n = s32[] get-tuple-element(%q), index=2
  %next = s32[] add(%j, {added})
  %other = s32[] add(%n, %one)
  ROOT %t = (s32[], f32[8], s32[]) tuple(%next, %x, {kept})
}}

ENTRY %main (a: f32[8], m: s32[]) -> f32[8] {{
  %a = f32[8] parameter(0)
  %m = s32[] parameter(1)
  %zero = s32[] constant({first})
  %start = s32[] copy(%zero)
  %seven = s32[] constant(7)
  %init = (s32[], f32[8], s32[]) tuple(%start, %a, {carried})
  %while = (s32[], f32[8], s32[]) while(%init), condition=%cond, body=%body{note}
  ROOT %out = f32[8] get-tuple-element(%while), index=1
}}
"""
PLAIN = {
    "limit": 4,
    "compared": "%i, %limit",
    "direction": "LT",
    "step": 1,
    "added": "%one",
    "kept": "%n",
    "first": 0,
    "carried": "%seven",
    "note": "",
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 4),
        ({"first": 1}, 3),
        ({"first": 9}, 0),
        ({"limit": 7, "step": 2}, 4),
        ({"limit": 8, "step": 2}, 4),
        ({"direction": "LE"}, 5),
        ({"compared": "%limit, %i", "direction": "GT"}, 4),
        ({"compared": "%i, %bound"}, 7),
        ({"compared": "%i, %bound", "added": "%n"}, 1),
        # The note of the compiler is taken as it is.
        ({"note": ', backend_config={"known_trip_count":{"n":"9"}}'}, 9),
        # What cannot be known: a bound that the loop changes, or that an argument gives.
        ({"compared": "%i, %bound", "kept": "%other"}, None),
        ({"compared": "%i, %bound", "carried": "%m"}, None),
        ({"step": -1}, None),
        ({"direction": "NE"}, None),
    ],
    ids=str,
)
def test_trips_of_a_loop(changes: dict[str, object], expected: int | None):
    module = parse_module(LOOP.format(**(PLAIN | changes)))
    entry = module.computations[module.entry]
    assert trip_count(module, entry, entry.by_name["while"]) == expected
