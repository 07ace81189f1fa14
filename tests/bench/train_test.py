"""`tessera bench train`: what it asks for, and that both sides train the same shape."""

import argparse
import importlib.util
import json

import numpy as np
import pytest

from research.bench import machine as bench_machine
from research.bench import sides as bench_sides
from research.bench import train as bench_train
from research.bench import train_sides as bench_train_sides
from research.core.errors import UserError
from tests.tiers import rest_in

TINY = bench_train.Shape(layers=1, width=16, heads=2, length=8, batch=2, vocabulary=32)


def arguments(*argv):
    parser = argparse.ArgumentParser()
    bench_train.add_arguments(parser)
    return parser.parse_args(argv)


def test_missing_torch_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"torch: pip install .*\[parity\]"):
        bench_train.main(arguments())


@pytest.mark.parametrize("side", rest_in("live", bench_train.SIDES, "tessera"))
def test_a_side_learns_its_batch(side, monkeypatch):
    if side == "torch":
        pytest.importorskip("transformers")
        pytest.importorskip("torch")
    monkeypatch.setattr(bench_train_sides, "SHAPE", TINY)
    monkeypatch.setattr(bench_train_sides, "LEARNING_RATE", 1e-2)
    take = getattr(bench_train_sides, f"{side}_step")("float32")
    losses = [take() for _ in range(10)]
    assert losses[0] == pytest.approx(np.log(TINY.vocabulary), rel=0.05)
    assert losses[-1] < losses[0] - 0.2


def test_rounds_alternate_and_the_report_holds_each(monkeypatch, tmp_path, capsys):
    asked = []

    class Worker:
        def __init__(self, command):
            self.side = command[1]

        def __enter__(self):
            return lambda steps: asked.append(self.side) or (1.0 if self.side == "tessera" else 2.0)

        def __exit__(self, *exception):
            pass

    monkeypatch.setattr(bench_sides, "worker", Worker)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    bench_train.main(
        arguments("--rounds=2", "--steps=1", "--dtype=float32", f"--json={tmp_path / 'out.json'}")
    )
    assert asked == ["tessera", "torch", "torch", "tessera", "tessera", "torch"]
    assert "2.00 (2.00 to 2.00) times the speed of torch" in capsys.readouterr().out
    (figure,) = json.loads((tmp_path / "out.json").read_text())["figures"].values()
    assert figure["rounds"] == {"tessera": [4096.0] * 2, "torch": [2048.0] * 2}

    monkeypatch.setattr(bench_machine, "_instructions", lambda: {"avx2"})
    bench_train.main(arguments("--rounds=2", "--steps=1", f"--json={tmp_path / 'out.json'}"))
    _, bfloat16 = json.loads((tmp_path / "out.json").read_text())["figures"].values()
    assert bfloat16["rounds"] == {"tessera": [4096.0] * 2}
    assert bfloat16["skipped"] == {"torch": "the processor has no bfloat16 instructions"}
