"""What a resumed run may change of its config, and what it may not."""

import pathlib

import pytest

from research.recipes import workdir
from research.recipes.experiment import load_experiment


@pytest.fixture(scope="module")
def folder(tiny: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    made = tmp_path_factory.mktemp("run")
    workdir.write_config(made, load_experiment(str(tiny), []))
    return made


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train.batch_size", "16"),
        ("train.accumulation", "2"),
        ("train.reduce_dtype", "bfloat16"),
        ("train.seed", "1"),
        ("model.dropout", "0.2"),
        ("model.attention.num_kv_heads", "4"),
        ("model.attention.softcap", "30.0"),
        ("optim.name", "lion"),
        ("start_from", "runs/other"),
    ],
)
def test_what_a_run_computes_is_fixed(folder, tiny, name: str, value: str):
    assert workdir.difference(folder, load_experiment(str(tiny), [(name, value)])) == name


def test_where_and_how_long_it_runs_is_not(folder, tiny):
    changes = {
        "mesh.pipeline": "2",
        "train.steps": "99",
        "train.pipeline.schedule": "gpipe",
        "train.eval_every": "1",
        "data.workers": "1",
        "model.remat": "dots",
        "model.layer_loop": "scan",
        "model.sequence_parallel": "True",
        "model.attention.exchange.kind": "all_gather",
        "model.attention.implementation": "reference",
        "checkpoint.every": "9",
        "distributed.initialize": "True",
        "trackers.wandb.project": "other",
        "train.log_every": "7",
        "train.eval_batches": "3",
        "train.max_skipped": "2",
        "data.prefetch": "1",
    }
    assert workdir.difference(folder, load_experiment(str(tiny), list(changes.items()))) is None
