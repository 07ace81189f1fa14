"""`tessera bench kernels`: what it refuses, that its sides compute the same, and what it makes of
their times.
"""

import argparse
import json
import re
import subprocess
import sys
from typing import ClassVar

import jax
import numpy as np
import pytest

from research.bench import kernels as bench_kernels
from research.bench import kernels_sides as bench_kernels_sides
from research.bench import sides as bench_sides
from research.core.errors import UserError

TINY = {
    "cross_entropy": (24, 8, 40),
    "grouped_matmul": (24, 8, 16, 3),
    "decode_attention": (3, 100, 4, 2, 8),
}


def arguments(*argv):
    parser = argparse.ArgumentParser()
    bench_kernels.add_arguments(parser)
    return parser.parse_args(argv)


def test_what_cannot_be_benched_is_one_line(monkeypatch):
    with pytest.raises(UserError, match=r"--rounds = 0 must be at least 1"):
        bench_kernels.main(arguments("--rounds=0"))
    with pytest.raises(
        UserError, match=r"--only = 'cross-entropy' is no kernel .* Did you mean 'cross_entropy'"
    ):
        bench_kernels.main(arguments("--only=grouped_matmul,cross-entropy"))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(UserError, match="needs a CPU or a GPU: no two processes share a TPU"):
        bench_kernels.main(arguments())


def result(kernel, side, dtype):
    function, make = bench_kernels_sides.BUILDERS[kernel](side, dtype, *TINY[kernel])
    return jax.tree.leaves(jax.jit(function)(*make()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", TINY)
def test_sides_return_the_same(kernel, dtype):
    ours, theirs = (
        result(kernel, side, dtype) for side in ("tessera", bench_kernels.PEERS[kernel][0])
    )
    for got, want in zip(ours, theirs, strict=True):
        scale = np.abs(np.asarray(want, np.float32)).max()
        difference = np.abs(np.asarray(got, np.float32) - np.asarray(want, np.float32)).max()
        assert difference < (1e-5 if dtype == "float32" else 0.02) * scale


def test_work_is_ragged_and_all_of_it_counted():
    sizes = bench_kernels_sides.group_sizes(4096, 8)
    assert (sum(sizes), len(sizes)) == (4096, 8)
    assert min(sizes) < 4096 / 8 < max(sizes)
    assert bench_kernels_sides.sequence_lengths(4, 4096) == [4096, 3584, 3072, 2560]
    # Pages of 64 tokens: 2 and 1 of them, keys and values, 2 heads of 8, bfloat16.
    assert bench_kernels_sides.page_bytes("bfloat16", 2, 65, 2, 8) == 2 * (2 + 1) * 64 * 2 * 8 * 2


class Worker:
    """A side that says how many seconds it took: as few as it must, and the same each round."""

    asked: ClassVar[list[str]] = []

    def __init__(self, command):
        self.side = command[3]

    def __enter__(self):
        return lambda count: (
            self.asked.append(self.side) or {"tessera": 1.0, "copy": 0.5}.get(self.side, 4.0)
        )

    def __exit__(self, *exception):
        pass


def test_rounds_alternate_and_ratios_are_ours_over_theirs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_sides, "worker", Worker)
    monkeypatch.setattr(Worker, "asked", [])
    monkeypatch.setattr(bench_kernels, "ROUND_FLOPS", 1)
    for kernel, sizes in TINY.items():
        monkeypatch.setitem(
            bench_kernels.SMALL, kernel, dict(zip(bench_kernels.SMALL[kernel], sizes, strict=True))
        )
    out = tmp_path / "out.json"
    bench_kernels.main(
        arguments("--rounds=2", "--only=grouped_matmul,decode_attention", f"--json={out}")
    )
    names = [["tessera", "ragged_dot"], ["tessera", "jax.nn", "copy"]]
    assert Worker.asked == [side for sides in names for side in 2 * (sides + sides[::-1] + sides)]
    printed = capsys.readouterr().out
    assert "grouped_matmul, float32, rows 24, width 8, features 16, experts 3" in printed
    assert "4.00 (4.00 to 4.00) times the speed of ragged_dot" in printed
    assert "0.250 (0.250 to 0.250) times the speed of copy" in printed
    figures = json.loads(out.read_text())["figures"]
    matmul, _, decode, copy, *_ = figures.values()
    assert matmul["rounds"] == {"tessera": [1000.0] * 2, "ragged_dot": [4000.0] * 2}
    assert matmul["note"].endswith("useful GFLOP/s")
    assert decode["rounds"] == {"tessera": [1000.0] * 2, "jax.nn": [4000.0] * 2}
    read = bench_kernels_sides.page_bytes("float32", 3, 100, 2, 8)
    assert copy["rounds"] == {
        "tessera": pytest.approx([read / 1e9] * 2),
        "copy": pytest.approx([4 * read / 1e9] * 2),
    }


def test_cross_entropy_is_measured_with_its_temporaries(monkeypatch):
    sizes = {"tokens": 2048, "width": 8, "vocabulary": 40_000}
    monkeypatch.setattr(bench_kernels, "ROUND_FLOPS", 1)
    ((_, figure),) = bench_kernels.measure("cross_entropy", "float32", sizes, 1)
    assert min(figure.rounds["tessera"] + figure.rounds["plain"]) > 0
    ours, theirs = (float(part) for part in re.findall(r"([\d.]+)%", figure.note))
    assert ours < 100 <= theirs


def test_it_runs_without_the_packages_for_data():
    missing = (
        "sys.modules.update(dict.fromkeys(('grain', 'tensorflow_datasets', "
        "'ml_collections', 'torch')))"
    )
    run = "runpy.run_module('research.bench.kernels', run_name='__main__')"
    code = f"import runpy, sys; {missing}; sys.argv = ['bench', '--help']; {run}"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "--only" in found.stdout, found.stderr
