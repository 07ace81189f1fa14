"""Makes `tests/recipes/older_workdir`: a run that was stopped after step 8 of 12, and what its last
steps gave.

Run once, at the root of a checkout of the commit whose files are to be kept readable (718c7bb),
under the flags of the compiler in `tests/conftest.py`, since other flags round otherwise:

    JAX_PLATFORMS=cpu XLA_FLAGS="…" python -m tests.recipes.make_older_workdir FOLDER

The model has each thing whose place in the state is easy to lose: experts whose selection biases
follow their load, a first layer that is built otherwise, multi-token prediction, averaged
parameters, dropout.
"""

import hashlib
import json
import os
import pathlib
import shutil
import signal
import sys
import tarfile

import jax
import numpy as np
import pytest

from research.core.errors import Interrupted
from research.core.trees import named_leaves
from research.training.metrics import read_metrics
from tests.recipes import runs

CONFIG = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({
        "model": {
            "vocab_size": 260, "num_layers": 3, "embed_dim": 8, "max_length": 64,
            "dropout": 0.1, "init_stddev": 0.1,
            "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4},
            "mlp": {"hidden_dim": 8},
            "experts": {
                "num_experts": 4, "experts_per_token": 2, "hidden_dim": 8,
                "selection_bias": True, "bias_speed": 0.01,
                "score": "sigmoid", "balance_weight": 0.01,
            },
            "first_layers": [{"experts": False}], "head": {"num_future": 1},
        },
        "data": {
            "sources": [{"kind": "text", "path": "corpus", "heldout_fraction": 0.2}],
            "tokenizer": {"kind": "bytes"},
        },
        "train": {
            "steps": 12, "batch_size": 8, "sequence_length": 32, "log_every": 1, "eval_every": 4,
        },
        "optim": {"learning_rate": 0.01, "schedule": {"warmup_steps": 2}, "ema_decay": 0.9},
        "checkpoint": {"every": 4, "keep": 1},
    })
"""


def digests(state: object) -> dict[str, str]:
    """The digest of the bytes of every array, by name."""
    return {
        name: hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
        for name, leaf in named_leaves(state).items()
    }


def main(folder: pathlib.Path) -> None:
    """Writes the config, the stopped workdir, and `expected.json`."""
    folder.mkdir(parents=True)
    os.chdir(folder)
    os.environ["TESSERA_CACHE"] = str(folder / "cache")
    runs.write_corpus(folder / "corpus")
    (folder / "tiny.py").write_text(CONFIG.lstrip())
    stopped, done = folder / "workdir", folder / "done"
    with pytest.MonkeyPatch.context() as patch:
        runs.at_step(patch, 8, lambda: os.kill(os.getpid(), signal.SIGTERM))
        try:
            runs.run(folder / "tiny.py", stopped)
            raise AssertionError("the run was not stopped")
        except Interrupted:
            pass
    shutil.copytree(stopped, done)
    with pytest.MonkeyPatch.context() as patch:
        batches = runs.record_batches(patch)
        state = runs.run(folder / "tiny.py", done)
    step = max(
        int(path.name) for path in (stopped / "checkpoints").iterdir() if path.name.isdigit()
    )
    rows = [row for row in read_metrics(done) if row["step"] > step]
    kept = [
        {
            name: value
            for name, value in row.items()
            if not name.startswith(("time/", "throughput/", "memory"))
        }
        for row in rows
    ]
    expected = {
        "step": step,
        "batches": [hashlib.sha256(batch).hexdigest() for batch in batches],
        "rows": kept,
        "last": digests(state),
        "last_norms": {
            name: float(np.linalg.norm(leaf))
            for name, leaf in named_leaves(jax.device_get(state)).items()
        },
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    for path in (stopped / "tensorboard", stopped / "plots"):
        shutil.rmtree(path, ignore_errors=True)
    with tarfile.open(folder / "workdir.tar.xz", "w:xz") as archive:
        archive.add(stopped, "workdir")
    for name in ("cache", "done", "corpus", "workdir"):
        shutil.rmtree(folder / name)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).absolute())
