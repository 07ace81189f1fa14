"""`tessera bench loader`: every objective can be measured, and what is counted are tokens that a
model reads.
"""

import argparse
import dataclasses
from typing import get_args

import numpy as np
import pytest

from research.bench import loader as bench_loader
from research.data.objectives.config import Kind
from research.data.sources import SourceConfig, documents
from research.data.stdlib import files
from research.data.tokenizers import TokenizerConfig


@pytest.mark.parametrize("objective", get_args(Kind))
def test_every_objective_is_measured(objective, tmp_path, monkeypatch, capsys):
    path = next(path for path in files().values() if 20_000 < path.stat().st_size < 40_000)
    corpus = SourceConfig(kind="text", path=str(path), heldout_fraction=0.0)
    prepare = bench_loader.prepare

    def prepare_little(config, folder):
        source = corpus if objective != "translate" else config.sources[0]
        tokenizer = TokenizerConfig(
            kind="bytes", mask=config.tokenizer.mask, sentinels=config.tokenizer.sentinels
        )
        return prepare(
            dataclasses.replace(config, sources=(source,), tokenizer=tokenizer), tmp_path
        )

    monkeypatch.setattr(bench_loader, "prepare", prepare_little)
    monkeypatch.setattr(bench_loader, "documents", lambda source, split: documents(corpus, split))
    parser = argparse.ArgumentParser()
    bench_loader.add_arguments(parser)
    bench_loader.main(
        parser.parse_args([f"--objective={objective}", "--rounds=1", "--tokens=5000"])
    )
    printed = capsys.readouterr().out
    assert printed.count(f"{objective}, ") == 2 * len(bench_loader.SHAPES)
    assert printed.count(" M tokens/core-second") == 2 * len(bench_loader.SHAPES)
    assert printed.count(" times the speed of crops") == 2 * len(bench_loader.SHAPES)


def test_tokens_of_both_sides_count_and_padding_does_not(monkeypatch):
    times = iter(range(9))
    monkeypatch.setattr(bench_loader.time, "perf_counter", lambda: next(times))
    segments = {"segments": np.array([[1, 1, 0]]), "encoder_segments": np.array([[1, 2, 2, 0]])}
    batch = segments | {"weights": np.zeros((1, 3)), "encoder_tokens": np.ones((1, 4))}
    assert bench_loader.rates(lambda: batch, 10)[0] == 50
