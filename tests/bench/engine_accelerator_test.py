"""The accelerator's part of `tessera bench engine`, with a small shape on what is here."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest

from research.bench import engine, engine_accelerator
from research.bench.engine_accelerator import Load, measure, roofline, rows
from research.interop.mapping import unrolled_shapes
from tests.tiny import tiny_config

CONFIG = dataclasses.replace(tiny_config(vocab_size=400, max_length=64), tied_embeddings=True)
LOADS = {"one": Load(1, 4, 8), "many": Load(4, 4, 8)}


def test_a_step_takes_the_larger_of_its_bytes_and_its_operations():
    load = Load(8, 16, 4)
    by_bytes = roofline(CONFIG, load, bandwidth=1e6, flops=1e18)
    assert roofline(CONFIG, load, bandwidth=2e6, flops=1e18) == pytest.approx(by_bytes / 2)
    by_operations = roofline(CONFIG, load, bandwidth=1e18, flops=1e6)
    assert roofline(CONFIG, load, bandwidth=1e18, flops=2e6) == pytest.approx(by_operations / 2)
    assert roofline(CONFIG, load, 1e6, 1e6) > max(by_bytes, by_operations) * 0.99
    # Of each token of prompts and answers two operations a parameter: 8 · (16 + 4) tokens.
    tokens = load.sequences * (load.prompt + load.answer)
    shapes = unrolled_shapes(CONFIG).values()
    multiplied = sum(math.prod(each.shape) for each in shapes if len(each.shape) > 1)
    assert by_operations * 1e6 == pytest.approx(2 * tokens * multiplied, rel=0.02)


def test_a_small_shape_is_measured(monkeypatch):
    monkeypatch.setattr(engine_accelerator, "COPIED_BYTES", 2**20)
    found = measure(CONFIG, LOADS, rounds=2)
    found |= {"device": "this", "flops": 1e12}
    cells = list(rows(found, CONFIG, LOADS))
    assert [row[0] for row in cells] == ["1 at once, 4 + 8 tokens", "4 at once, 4 + 8 tokens"]
    assert all(0 < float(row[3].split()[0]) < 1 for row in cells)
    assert [each.what for each in engine.accelerator_rows({"rows": cells})] == [
        row[0] for row in cells
    ]


def test_without_an_accelerator_it_says_so():
    command = [sys.executable, "-m", engine.ACCELERATOR_SIDE, engine.SHAPE, "1"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    [row] = engine.accelerator_rows(json.loads(found.stdout))
    assert row.beside == "left out"
    assert "no accelerator" in row.also


def test_it_needs_no_loader_of_data():
    names = ("grain", "tensorflow_datasets", "tensorflow")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({names!r}))\n"
        "import research.bench.engine_accelerator, research.bench.exactness"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
