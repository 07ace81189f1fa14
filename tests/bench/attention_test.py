"""`tessera bench attention`: what it refuses, that its sides compute the same, and what its counts
are made of.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from research.bench import attention as bench_attention
from research.bench import attention_sides as bench_attention_sides
from research.bench import machine as bench_machine
from research.bench import sides as bench_sides
from research.core.errors import UserError


def arguments(*argv):
    parser = argparse.ArgumentParser()
    bench_attention.add_arguments(parser)
    return parser.parse_args(argv)


def test_what_cannot_be_benched_is_one_line(monkeypatch):
    with pytest.raises(UserError, match=r"--rounds = 0 must be at least 1"):
        bench_attention.main(arguments("--rounds=0"))
    with pytest.raises(UserError, match=r"--target = 'gpu' needs a GPU: the backend is 'cpu'"):
        bench_attention.main(arguments("--target=gpu"))
    with pytest.raises(UserError, match=r"--lengths = '4096,many' must be multiples of 2048"):
        bench_attention.main(arguments("--target=tpu-schedule", "--lengths=4096,many"))
    with pytest.raises(
        UserError, match=r"--chips = 'v5e,v6' names 'v6', no TPU generation. Did you mean 'v6e'"
    ):
        bench_attention.main(arguments("--target=tpu-schedule", "--chips=v5e,v6"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -c constraints.txt -e '.\[tpu\]'"):
        bench_attention.main(arguments("--target=tpu-schedule"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sides_return_value_and_gradients_of_the_same_attention(dtype):
    ours, theirs = (
        bench_attention_sides.jax_side(side, dtype, 1, 64, 2, 8)() for side in ("tessera", "jax.nn")
    )
    for got, want in zip((ours[0], *ours[1]), (theirs[0], *theirs[1]), strict=True):
        difference = np.abs(np.asarray(got, np.float32) - np.asarray(want, np.float32)).max()
        assert difference < (1e-5 if dtype == "float32" else 0.1)


def test_rounds_alternate_and_ratios_are_theirs_over_ours(monkeypatch, tmp_path, capsys):
    asked = []

    class Worker:
        def __init__(self, command):
            self.side = command[1]

        def __enter__(self):
            return lambda count: (
                asked.append(self.side) or {"tessera": 1.0, "jax.nn": 3.0}[self.side]
            )

        def __exit__(self, *exception):
            pass

    monkeypatch.setattr(bench_sides, "worker", Worker)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench_attention, "CPU_SHAPES", ((1, 4096, 1, 8),))
    bench_attention.main(arguments("--target=cpu", "--rounds=2", f"--json={tmp_path / 'out.json'}"))
    assert asked == ["tessera", "jax.nn", "jax.nn", "tessera", "tessera", "jax.nn"] * 2
    printed = capsys.readouterr().out
    assert "3.00 (3.00 to 3.00) times the speed of jax.nn" in printed
    figure = json.loads((tmp_path / "out.json").read_text())["figures"][
        "float32, 1 × 4,096 tokens, 1 heads of 8"
    ]
    assert figure["rounds"] == {"tessera": [1000.0] * 2, "jax.nn": [3000.0] * 2}
    assert figure["skipped"] == {"torch": "it is not installed (extra `parity`)"}
    assert "torch        left out: it is not installed" in printed


def test_torch_is_no_peer_in_bfloat16_where_it_has_no_instructions_for_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(bench_machine, "_instructions", lambda: {"avx2"})
    assert bench_attention._peers("cpu", "float32") == (["jax.nn", "torch"], {})
    assert bench_attention._peers("cpu", "bfloat16")[0] == ["jax.nn"]
    assert bench_attention._peers("gpu", "bfloat16") == (["cudnn"], {})


def test_a_row_of_schedules_is_cycles_beside_the_best_blocks(monkeypatch, capsys):
    def count(side, chip, length, *blocks):
        cycles = 100 if side == "tessera" else 100 + sum(blocks)
        part = {"cycles": cycles, "cycles_per_mac": 0.02, "busy": 0.5, "steady": 0.75}
        return {"blocks": blocks, "forward": part, "backward": part}

    monkeypatch.setattr(bench_attention, "_count", count)
    monkeypatch.setattr(bench_attention, "tpu_devices", lambda chip: None)
    ((name, figure), _) = bench_attention.schedules(["v5e"], [4096])
    assert name == "v5e, 4,096 tokens, forward"
    assert figure.rounds == {"tessera": [100], "splash": [100 + 3 * 512]}
    assert "matrix units 50% full, in the steady loop 75%" in figure.note


@pytest.mark.compilers
def test_our_schedule_is_counted_to_be_shorter_than_splash_s(tmp_path):
    pytest.importorskip("libtpu", reason="needs the extra `tpu`")
    cycles, length = {}, 2048
    for side, blocks in (("tessera", ()), ("splash", (1024, 1024, 512, 1))):
        folder = tmp_path / side
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        command = [
            sys.executable,
            "-m",
            bench_attention.COUNT,
            str(folder),
            side,
            "v5e",
            str(length),
            *map(str, blocks),
        ]
        environment = os.environ | {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu"}
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        cycles[side] = json.loads(found.stdout.splitlines()[-1])
    for part, products in (("forward", 2), ("backward", 5)):
        ours, theirs = (cycles[side][part] for side in ("tessera", "splash"))
        # No fewer than the matrix units need: four of 128 × 128 on a v5e.
        assert ours["cycles"] > products * 16 * length * (length + 1) / 2 * 128 / (4 * 128 * 128)
        assert ours["cycles_per_mac"] < theirs["cycles_per_mac"]
        assert 0.5 < ours["busy"] <= 1
