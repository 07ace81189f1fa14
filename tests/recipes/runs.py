"""Tiny runs of the real verbs: a corpus of a few texts, a config file, and the command line in this
process.
"""

import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from research import cli
from research.core.errors import Interrupted
from research.core.trees import named_leaves
from research.data.loader import Loader
from research.recipes.experiment import load_experiment
from research.recipes.train import train
from research.training.metrics import MetricsWriter, read_metrics
from research.training.state import TrainState

ROOT = pathlib.Path(__file__).parent.parent.parent
STEPS = 12

CONFIG = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({{
        "model": {{
            "vocab_size": 384, "num_layers": 2, "embed_dim": 16, "max_length": 64,
            "dropout": 0.1, "init_stddev": 0.1,
            "attention": {{"num_heads": 4, "num_kv_heads": 2, "head_dim": 4}},
            "mlp": {{"hidden_dim": 32}},
        }},
        "data": {{
            "sources": [{{"kind": "text", "path": {path!r}, "heldout_fraction": 0.2}}],
            "tokenizer": {{"kind": "bytes"}},
        }},
        "train": {{
            "steps": 12, "batch_size": 8, "sequence_length": 32, "log_every": 1, "eval_every": 4,
        }},
        "optim": {{"learning_rate": 0.01, "schedule": {{"warmup_steps": 2}}, "ema_decay": 0.9}},
        "checkpoint": {{"every": 4}},
    }})
"""


def write_corpus(folder: pathlib.Path, count: int = 40) -> pathlib.Path:
    """Writes texts of different lengths that a byte model can learn something from."""
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:02}.txt").write_text(
            f"{i} times: " + "the cat sat on the mat. " * (1 + i % 5)
        )
    return folder


def write_config(folder: pathlib.Path, corpus: pathlib.Path) -> pathlib.Path:
    """Writes the config file of a tiny run over `corpus`."""
    path = folder / "tiny.py"
    path.write_text(CONFIG.format(path=str(corpus)))
    return path


def flags(changes: dict[str, Any]) -> list[str]:
    """Returns changes of a config as the command line takes them."""
    return [f"--config.{name}={value}" for name, value in changes.items()]


def command(verb: str, config: pathlib.Path, workdir: pathlib.Path, *more: str) -> int:
    """Runs a verb of the command line in this process and returns its exit status."""
    return cli.main([verb, f"--config={config}", f"--workdir={workdir}", *more])


def run(config: pathlib.Path, workdir: pathlib.Path, **changes: Any) -> TrainState:
    """Trains in this process; changes are dotted names of the config with `__` for the dot."""
    pairs = [(name.replace("__", "."), str(value)) for name, value in changes.items()]
    return train(load_experiment(str(config), pairs), workdir)


def spawn(
    *arguments: str, devices: int = 8, terminal: int | None = None, **environment: str
) -> subprocess.Popen[str]:
    """Starts the command line as its own process, both streams on pipes, or on a terminal."""
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        "PYTHONPATH": str(ROOT),
        **environment,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "research", *arguments],
        env=environment,
        stdout=subprocess.PIPE if terminal is None else terminal,
        stderr=subprocess.PIPE if terminal is None else terminal,
        text=True,
        encoding="utf-8",
    )


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Has `act` happen when the training row of a step is written."""
    write = MetricsWriter.write

    def writing(self: MetricsWriter, written: int, metrics: Any) -> None:
        write(self, written, metrics)
        if written == step and "train/loss" in metrics:
            act()

    monkeypatch.setattr(MetricsWriter, "write", writing)


def run_until(step: int, config: pathlib.Path, workdir: pathlib.Path, **changes: Any) -> None:
    """Trains as `run` does until SIGTERM comes when the row of a step is written, which saves the
    run's state.
    """
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted):
            run(config, workdir, **changes)


def record_batches(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Returns a list that receives the tokens of every training batch, in the order of their
    use.
    """
    seen, take = [], Loader.next

    def taking(self: Loader, state: Any = None) -> dict[str, np.ndarray]:
        batch = take(self, state)
        seen.append(batch["tokens"].tobytes())
        return batch

    monkeypatch.setattr(Loader, "next", taking)
    return seen


def assert_same_state(state: TrainState, other: TrainState) -> None:
    """Every array of both is bitwise the same."""
    ours, theirs = named_leaves(state), named_leaves(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(
            np.asarray(ours[name]), np.asarray(theirs[name]), err_msg=name
        )


def rows_without_times(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns what a run has measured, less what depends on the machine."""
    return [
        {
            name: value
            for name, value in row.items()
            if not name.startswith(("time/", "throughput/"))
        }
        for row in read_metrics(workdir)
    ]


def contents(folder: pathlib.Path) -> dict[str, bytes | None]:
    """Returns every file under a folder with its bytes, and every folder with None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }
