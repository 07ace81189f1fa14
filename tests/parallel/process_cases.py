"""What several real processes do together: runs on meshes whose axes lie across them.

    python -m tests.parallel.process_cases INDEX PROCESSES PORT FOLDER

Each process writes to FOLDER, under `results-PROCESSES-INDEX.json`, what went wrong in each case,
or null. The runs of one device that it compares with are in FOLDER already (`expected.pickle`).
"""

import dataclasses
import functools
import json
import pathlib
import pickle
import sys
import time
import traceback
from collections.abc import Callable

import jax
import numpy as np

from research.core.errors import UserError
from research.models.config import ModelConfig
from research.parallel.distributed import DistributedConfig, initialize
from research.parallel.mesh import make_mesh
from research.parallel.mesh_config import MeshConfig, SlicesConfig
from research.parallel.process_parts import process_columns, process_rows
from research.parallel.rules import batch_sharding
from research.recipes.experiment import ExperimentConfig, load_experiment
from research.recipes.inputs import make_loader, prepare_data
from research.recipes.train import train as train_verb
from research.training.step import shard_batch
from tests.models.variants import VARIANTS
from tests.parallel.products import Run, assert_equal_runs, train

DEVICES = 8
# Of the run whose checkpoints are handed from 4 processes to 2, and to the test itself.
STEPS = {4: 3, 2: 5, 1: 7}
RUN_CHANGES = {
    "optim.schedule.name": "constant",
    "train.eval_every": 0,
    "train.self_check": False,
    "model.layer_loop": "scan",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on a mesh; `crosses` are the axes that lie across processes."""

    processes: int
    model: str
    crosses: tuple[str, ...]
    mesh: MeshConfig

    @property
    def microbatches(self) -> int:
        """Of a step: a pipeline needs several to fill, and more take longer to compile."""
        return self.mesh.pipeline


CASES = [
    Case(2, "untied", ("data",), MeshConfig(data=2, fsdp=2, tensor=2)),
    Case(2, "untied", ("fsdp",), MeshConfig(data=1, fsdp=4, tensor=2, zero=2)),
    Case(2, "tied", ("pipeline",), MeshConfig(data=1, pipeline=2, context=2, tensor=2)),
    Case(2, "tied", ("context",), MeshConfig(data=1, context=4, tensor=2)),
    Case(2, "experts", ("expert",), MeshConfig(data=1, expert=4, tensor=2)),
    Case(
        2,
        "tied",
        ("tensor",),
        MeshConfig(data=1, fsdp=2, context=2, tensor=2, slices=SlicesConfig(tensor=2)),
    ),
    Case(4, "untied", ("data", "fsdp"), MeshConfig(data=2, fsdp=2, tensor=2)),
    Case(4, "tied", ("pipeline", "context"), MeshConfig(data=1, pipeline=2, context=2, tensor=2)),
    Case(
        4,
        "experts",
        ("expert", "tensor"),
        MeshConfig(data=1, expert=4, tensor=2, slices=SlicesConfig(expert=2, tensor=2)),
    ),
]


def model_of(name: str) -> ModelConfig:
    """Four scanned layers with dropout, for up to four stages."""
    variant = VARIANTS["experts" if name == "experts" else "sinks"]
    tied = name == "tied"
    return dataclasses.replace(
        variant, num_layers=4, dropout=0.1, layer_loop="scan", tied_embeddings=tied
    )


@functools.lru_cache
def alone(name: str, microbatches: int) -> Run:
    """The run of a model on one device."""
    devices = jax.devices()[:1]
    return train(model_of(name), MeshConfig(), devices, accumulation=microbatches)


def named(case: Case) -> str:
    """The name of a case, as `4 processes: tied over pipeline, context`."""
    return f"{case.processes} processes: {case.model} over {', '.join(case.crosses)}"


def run_meshes(processes: int, folder: pathlib.Path) -> dict[str, Callable[[], None]]:
    """Runs of models on meshes, each compared with that of one device."""
    expected = pickle.loads((folder / "expected.pickle").read_bytes())

    def check(case: Case) -> None:
        model = model_of(case.model)
        found = train(model, case.mesh, accumulation=case.microbatches)
        assert_equal_runs(found, expected[case.model, case.microbatches], model)

    return {
        named(case): lambda case=case: check(case) for case in CASES if case.processes == processes
    }


def experiment(folder: pathlib.Path, steps: int, **changes: object) -> ExperimentConfig:
    """The tiny run, as the test has written its config to the folder."""
    assignments = {"train.steps": steps, **RUN_CHANGES, **changes}
    texts = [(name, str(value)) for name, value in assignments.items()]
    return load_experiment(str(folder / "tiny.py"), texts)


def check_columns(processes: int, folder: pathlib.Path) -> None:
    """Each process places the tokens of its own columns, from its own loader."""
    config = experiment(folder, 1)
    mesh = make_mesh(MeshConfig(data=1, context=processes, tensor=DEVICES // processes))
    sharding = batch_sharding(mesh)
    size, length = config.train.batch_size, config.train.sequence_length
    prepared = prepare_data(config)
    whole = next(make_loader(config, prepared))
    mine = next(make_loader(config, prepared, process_rows(sharding, size)))

    like = {
        name: jax.ShapeDtypeStruct((size, length), array.dtype, sharding=sharding)
        for name, array in mine.items()
    }
    start, stop = process_columns(sharding, length)
    each = length // processes
    assert (start, stop) == (jax.process_index() * each, (jax.process_index() + 1) * each)
    for name, array in shard_batch(mine, like).items():
        assert array.shape == (size, length)
        for shard in array.addressable_shards:
            rows, columns = shard.index
            assert (columns.start, columns.stop) == (start, stop)
            np.testing.assert_array_equal(shard.data, whole[name][rows, columns])
    # The control: other columns have other tokens.
    other = (start + each) % length
    assert not np.array_equal(
        whole["tokens"][:, start:stop], whole["tokens"][:, other : other + each]
    )


def run_verb(processes: int, folder: pathlib.Path) -> None:
    """`tessera train`, resumed where more processes have stopped."""
    mesh = {"mesh.data": 1, "mesh.context": processes, "mesh.fsdp": DEVICES // processes}
    state = train_verb(experiment(folder, STEPS[processes], **mesh), folder / "run")
    assert int(state.step) == STEPS[processes]


def check_refusal(processes: int, folder: pathlib.Path) -> None:
    """Processes with different configs refuse before they write or compile anything."""
    changes = {"train.seed": int(jax.process_index() == processes - 1)}
    try:
        train_verb(experiment(folder, 1, **changes), folder / "refused")
    except UserError as error:
        message = str(error)
    else:
        raise AssertionError("different seeds were not refused")
    assert message.startswith(f"train.seed = 1 on process {processes - 1}, but 0 on process 0")
    assert not (folder / "refused").exists()


def main() -> None:
    """Runs all cases of this number of processes."""
    index, processes, port = (int(text) for text in sys.argv[1:4])
    folder = pathlib.Path(sys.argv[4])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    initialize(DistributedConfig(True, f"127.0.0.1:{port}", processes, index))
    assert (jax.process_count(), jax.device_count()) == (processes, DEVICES)

    cases = run_meshes(processes, folder) | {
        f"{processes} processes: columns": lambda: check_columns(processes, folder),
        f"{processes} processes: tessera train": lambda: run_verb(processes, folder),
        f"{processes} processes: different configs": lambda: check_refusal(processes, folder),
    }
    results: dict[str, str | None] = {}
    began = time.monotonic()
    for name, run in cases.items():
        try:
            run()
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
        path = folder / f"results-{processes}-{index}.json"
        path.write_text(json.dumps(results))
        print(f"{time.monotonic() - began:6.1f} s  {name}", flush=True)


if __name__ == "__main__":
    main()
