"""The part `steps` of `tessera bench engine`: a step compiled for TPUs, its cycles and bytes."""

import dataclasses
import functools
import importlib.util
import json

import pytest

from research.bench import engine_steps
from research.bench.engine_steps import KERNEL, CompiledRead, chip_rows, compile_step, step_rows
from research.bench.estimated_cycles import estimated_cycles
from research.bench.llama_shapes import llama
from research.models.config import ModelConfig
from research.scaling.topology import tpu_devices


def small(layers: int) -> ModelConfig:
    config = llama(1024, layers, 256, 512, (8, 4, 64), 512)
    return dataclasses.replace(config, dtype="bfloat16", param_dtype="bfloat16")


@functools.cache
def compiled(layers: int) -> CompiledRead:
    pytest.importorskip("libtpu", reason="needs the extra `tpu`")
    return compile_step(small(layers), tpu_devices("v5e")[0])


@pytest.mark.compilers
def test_cycles_grow_with_layers_and_tiles():
    two, four, six = (estimated_cycles(compiled(layers).text, 1) for layers in (2, 4, 6))
    assert 0 < two.estimated < four.estimated < six.estimated
    assert (two.without[KERNEL], six.without[KERNEL]) == (2, 6)

    assert compiled(6).temporaries < compiled(6).layer_bytes

    tiles = [estimated_cycles(compiled(2).text, count) for count in (1, 2, 4)]
    one, pair, all_four = (each.estimated for each in tiles)
    assert all_four - pair == 2 * (pair - one) > 0
    assert tiles[-1].without[KERNEL] == 8


def test_a_row_is_a_step_on_a_chip():
    cycles = [{"estimated": 1000, "kernel": 50, "without": 2}]
    cycles.append({"estimated": 4000, "kernel": 200, "without": 8})
    found = {"weights": 3e6, "layer": 2e6, "temporaries": 1e6, "cycles": cycles}
    decode, mixed = chip_rows("v5e", found)
    assert decode.what == "a step of 16 rows, TPU v5e"
    assert (decode.measured, decode.ratio) == ("1,050 cycles", "0.500")
    assert "left out: 2 instructions" in decode.also
    assert decode.beside == "weights 3 MB, a layer's pages 2.0 MB"
    assert mixed.what == "a step of 64 rows, TPU v5e"
    assert mixed.measured == "4,200 cycles"
    # Each tile reads them.
    assert mixed.beside.startswith("weights 12 MB")


def test_each_chip_has_its_rows(monkeypatch):
    asked = []

    def run(command, variables):
        asked.append(command[-1])
        assert command[1] in variables["LIBTPU_INIT_ARGS"]
        part = {"estimated": 1, "kernel": 2, "without": 0}
        found = {"weights": 1, "layer": 1, "temporaries": 1, "cycles": [part, part]}
        return f"a line\n{json.dumps(found)}\n"

    monkeypatch.setattr(engine_steps, "check_tpu_compiler", lambda: None)
    monkeypatch.setattr(engine_steps, "run", run)
    assert len(list(step_rows())) == 6
    assert asked == ["v5e", "v5p", "v6e"]


def test_without_a_compiler_the_part_is_left_out(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    [row] = step_rows()
    assert row.beside == "left out"
    assert "pip install" in row.also
