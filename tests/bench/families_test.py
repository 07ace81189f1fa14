"""`tessera bench families`: a row counts each model's own FLOPs, and what it refuses."""

import argparse
import json

import pytest

from research.bench import families
from research.core.errors import UserError


def arguments(*argv):
    parser = argparse.ArgumentParser()
    families.add_arguments(parser)
    return parser.parse_args(argv)


def test_a_row_is_the_flops_a_second_beside_the_decoder_s(tmp_path, monkeypatch):
    monkeypatch.setattr(
        families,
        "interleave_workers",
        lambda commands, rounds, count: dict.fromkeys(commands, [2.0] * rounds),
    )
    families.main(
        arguments(
            "--only=gemma.py:3-1b", "--rounds=1", "--steps=3", f"--json={tmp_path / 'out.json'}"
        )
    )
    figure = json.loads((tmp_path / "out.json").read_text())["figures"]["gemma.py:3-1b"]
    work = {
        side: 3 * families.flops(families.load(side, "float32"))
        for side in ("gemma.py:3-1b", "gpt2")
    }
    assert figure["is_rate"]
    assert figure["rounds"] == {side: pytest.approx([flops / 2e9]) for side, flops in work.items()}


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--only=gema", "--only = 'gema' is not a preset. Did you mean 'gemma'"),
        ("--only=gpt2", "--only = 'gpt2' is what all others are measured beside"),
        ("--only=llama:99b", "--only = 'llama:99b': size = '99b' is not a LLaMA"),
        ("--steps=0", "--steps = 0 must be at least 1"),
    ],
)
def test_mistakes_are_one_line(flag, said):
    with pytest.raises(UserError, match=f"^{said}"):
        families.main(arguments(flag))
