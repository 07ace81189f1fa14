"""One side of `tessera bench families`, a process: the training step of one preset."""

import sys

from research.bench.sides import serve
from research.core import backend


def main(spec: str, dtype: str) -> None:
    """Serves steps until the input ends."""
    backend.configure()
    # JAX reads the settings above when it starts.
    import jax
    import numpy as np

    from research.bench.families import BATCH, LENGTH, VOCABULARY, load
    from research.data.objectives import ObjectiveConfig, batch_shapes
    from research.optim.optimizers import OptimConfig
    from research.optim.schedules import ScheduleConfig
    from research.parallel.mesh_config import MeshConfig
    from research.training.config import TrainConfig
    from research.training.language_model import language_model_program
    from research.training.step import shard_batch

    model = load(spec, dtype)
    kinds = {
        "decoder": "causal",
        "encoder": "masked",
        "prefix": "prefix",
        "encoder_decoder": "span",
    }
    objective = ObjectiveConfig(kind=kinds[model.structure])
    optim = OptimConfig(
        learning_rate=1e-4, schedule=ScheduleConfig(name="constant"), clip_norm=None
    )
    train = TrainConfig(steps=1_000_000, batch_size=BATCH, sequence_length=LENGTH)
    program = language_model_program(
        model, optim, train, MeshConfig(), jax.devices()[:1], objective
    )
    step = program.compile_train_step()
    state = program.create(jax.random.key(0))

    # Random tokens in whole rows, of which a prefix model reads the first half at once.
    random = np.random.default_rng(0)
    rows = {}
    for name, (shape, kind) in batch_shapes(objective, BATCH, LENGTH).items():
        if name.endswith("positions"):
            rows[name] = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape)
        elif name.endswith(("tokens", "targets")):
            rows[name] = random.integers(VOCABULARY, size=shape, dtype=np.int32)
        elif name == "prefix":
            in_prefix = np.arange(LENGTH) < LENGTH // 2
            rows[name] = np.broadcast_to(in_prefix.astype(np.int32), shape)
        else:  # segments and weights: whole rows
            rows[name] = np.ones(shape, kind)
    batch = shard_batch(rows, program.batch)

    def take() -> float:
        nonlocal state
        state, metrics = step(state, {}, batch)
        return float(metrics["loss"])

    serve(take)


if __name__ == "__main__":
    main(*sys.argv[1:])
