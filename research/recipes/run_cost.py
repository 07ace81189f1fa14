"""What a run costs in seconds: a few steps and one evaluation are timed."""

import dataclasses
import statistics
import time

import jax

from research.core.backend import cache_folder
from research.core.errors import within
from research.core.random import key_for
from research.core.trees import count
from research.data.objectives import encoder_length
from research.data.prepare import prepare
from research.models.flops import train_flops_per_token
from research.recipes.experiment import ExperimentConfig
from research.recipes.inputs import heldout_rows
from research.recipes.run_parts import evaluation, first_batch_check
from research.training.language_model import language_model_program
from research.training.step import shard_batch

TIMED_STEPS = 3
# Steps may become slower while a run goes on: other work on the machine, a processor that heats up.
MARGIN = 1.1


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a run of a config takes.

    Attributes:
      parameters: of the model.
      start: seconds before the first step: making the state, compiling, the check of a batch.
      step: seconds.
      evaluation: seconds of one over all held-out batches.
      timed: whether it was timed here, or follows from the FLOPs of a config that was.
    """

    parameters: int
    start: float
    step: float
    evaluation: float
    timed: bool = True

    def seconds(self, config: ExperimentConfig) -> float:
        """Returns the seconds of a whole run with the margin for its steps."""
        train = config.train
        evaluations = 1 + ((train.steps - 1) // train.eval_every if train.eval_every else 0)
        return self.start + MARGIN * (train.steps * self.step + evaluations * self.evaluation)


def with_steps(config: ExperimentConfig, steps: int) -> ExperimentConfig:
    """Returns the config of a run of so many steps; what it counts in steps shrinks likewise."""
    share = steps / config.train.steps

    def scaled(count: int) -> int:
        # 0 has a meaning of its own: no warm-up, or no evaluation but the last.
        return max(1, round(share * count)) if count else 0

    eval_every = scaled(config.train.eval_every)
    train = dataclasses.replace(config.train, steps=steps, eval_every=eval_every)

    schedule = config.optim.schedule
    warmup = min(scaled(schedule.warmup_steps), steps - 1)
    decay = min(scaled(schedule.decay_steps), steps - warmup)
    schedule = dataclasses.replace(schedule, warmup_steps=warmup, decay_steps=decay)
    optim = dataclasses.replace(config.optim, schedule=schedule)

    checkpoint = config.checkpoint
    every = scaled(checkpoint.every)
    keep_every = checkpoint.keep_every
    if keep_every is not None:
        keep_every = every * (keep_every // checkpoint.every)  # a multiple, as before
    checkpoint = dataclasses.replace(checkpoint, every=every, keep_every=keep_every)
    return dataclasses.replace(config, train=train, optim=optim, checkpoint=checkpoint)


def measure(config: ExperimentConfig) -> Cost:
    """Takes a few steps and one evaluation of a new state, on held-out rows; nothing is kept but
    the compiled programs.
    """
    with within("data"):
        prepared = prepare(config.data, cache_folder() / "data")
    start = time.perf_counter()
    program = language_model_program(
        config.model, config.optim, config.train, config.mesh, objective=config.data.objective
    )
    batch = shard_batch(next(heldout_rows(config, prepared)), program.batch)
    state, frozen = program.resume_or_create(None, key_for(config.train.seed, "init"))
    evaluate = evaluation(config, program, frozen, prepared, (0, 1))
    first_batch_check(config, program, frozen)(state, batch)
    step = program.compile_train_step()
    started = time.perf_counter() - start

    seconds = []
    for _ in range(1 + TIMED_STEPS):  # the first one warms up
        start = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)

    start = time.perf_counter()
    evaluate(state)
    return Cost(
        parameters=count(program.saved.params),
        start=started,
        step=statistics.median(seconds[1:]),
        evaluation=time.perf_counter() - start,
    )


def _flops(config: ExperimentConfig) -> float:
    """Returns those of a training step."""
    length = config.train.sequence_length
    further = encoder_length(config.data.objective, length)
    tokens = config.train.batch_size * length
    return tokens * train_flops_per_token(config.model, length, further)


def estimate(config: ExperimentConfig, like: ExperimentConfig, cost: Cost) -> Cost:
    """Returns the cost of a config from that of another one, by the ratio of their FLOPs."""
    ratio = _flops(config) / _flops(like)
    program = language_model_program(
        config.model, config.optim, config.train, config.mesh, objective=config.data.objective
    )
    return Cost(
        parameters=count(program.saved.params),
        start=cost.start,
        step=ratio * cost.step,
        evaluation=ratio * cost.evaluation,
        timed=False,
    )
