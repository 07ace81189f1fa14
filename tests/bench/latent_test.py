"""`tessera bench latent`: its rows and what it refuses."""

import argparse
import json

import pytest

from research.bench import latent
from research.core.errors import UserError


def arguments(*argv):
    parser = argparse.ArgumentParser()
    latent.add_arguments(parser)
    return parser.parse_args(argv)


def test_each_batch_and_type_has_a_row_of_milliseconds_a_step(tmp_path, monkeypatch):
    def interleave_workers(commands, rounds, count):
        assert all(command[1] == form for form, command in commands.items())
        return {"weight_absorption": [0.1] * rounds, "decompressed": [0.5] * rounds}

    monkeypatch.setattr(latent, "interleave_workers", interleave_workers)
    latent.main(arguments("--rounds=2", f"--json={tmp_path / 'out.json'}"))
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert list(figures) == [
        f"{kind}, batch {n}, 2,048 slots" for n in (1, 8) for kind in ("float32", "bfloat16")
    ]
    for figure in figures.values():
        assert figure["rounds"] == {
            "weight_absorption": pytest.approx([10.0] * 2),
            "decompressed": pytest.approx([50.0] * 2),
        }


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--batch=8,0", "--batch = '8,0' must be whole numbers of at least 1"),
        ("--steps=0", "--steps = 0 must be at least 1"),
        ("--slots=64", "--slots = 64 must be at least 160"),
    ],
)
def test_mistakes_are_one_line(flag, said):
    with pytest.raises(UserError, match=f"^{said}"):
        latent.main(arguments(flag))
