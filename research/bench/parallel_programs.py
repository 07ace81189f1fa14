"""Training steps of small models on eight devices, each with one kind of parallelism."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from research.bench import parallel_formulas as formulas
from research.core.trees import named_leaves
from research.kernels.attention import KeyExchange
from research.models.config import AttentionConfig, ExpertsConfig, MlpConfig, ModelConfig
from research.optim.optimizers import OptimConfig
from research.optim.schedules import ScheduleConfig
from research.parallel.mesh_config import MeshConfig
from research.parallel.pipeline_schedule import make_schedule
from research.parallel.pipeline_slots import make_tables
from research.scaling.collectives import Collective, collectives
from research.scaling.topology import tpu_devices
from research.training.config import TrainConfig
from research.training.language_model import language_model_program
from research.training.program import Program
from research.training.step import shard_batch

DEVICES = 8
TPU = "v5e:2x4"
ROWS = 16
# A TPU keeps 16 tokens in bfloat16 together, and so each of eight devices must have as many.
LENGTH = 128
CHOICES = 2
# Collectives to which a device gives less are of single numbers, and of one a token.
SMALL = 2**13
# As many layers as a model of seven billion parameters, and small ones.
MODEL = ModelConfig(
    vocab_size=1024,
    num_layers=32,
    embed_dim=128,
    max_length=LENGTH,
    attention=AttentionConfig(8, 8, 16),
    mlp=MlpConfig(512),
    layer_loop="scan",
)
EXPERTS = ExpertsConfig(DEVICES, CHOICES, hidden_dim=256, buffer_factor=1.0)
# Wide enough that the TPU compiler need not pad what a device has of a matrix.
TPU_MODEL = dataclasses.replace(
    MODEL,
    embed_dim=1024,
    attention=AttentionConfig(8, 8, 128),
    mlp=MlpConfig(2048),
    dtype="bfloat16",
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes that formulas are made of.

    Attributes:
      layers: the parameters of all layers, and so their gradients.
      others: those of all other parameters.
      number: of an activation, and of a parameter that is gathered for a layer.
      hidden: the hidden states of all tokens.
      heads: a device's queries, and as well its keys, values and outputs.
      num_layers: how many layers.
      microbatches: of a batch.
    """

    layers: float
    others: float
    number: int
    hidden: float
    heads: float
    num_layers: int
    microbatches: int

    @property
    def parameters(self) -> float:
        """All parameters."""
        return self.layers + self.others

    @property
    def share_gathered(self) -> float:
        """Bytes of a gathered number over those of a parameter, which is in float32."""
        return self.number / 4


@dataclasses.dataclass(frozen=True)
class Case:
    """A kind of parallelism.

    Attributes:
      mesh: the axis of all devices, and the ZeRO level.
      formula: the bytes that a device sends.
      source: of its collectives, which is in their names; those of others are counted apart.
      change: of the model.
      microbatches: of a batch.
      tpu_options: of the compiler for TPUs.
    """

    mesh: MeshConfig
    formula: Callable[[Sizes], float]
    source: str = ""
    change: Callable[[ModelConfig], ModelConfig] = lambda model: model
    microbatches: int = 1
    tpu_options: tuple[str, ...] = ()


def _zero_3(sizes: Sizes) -> float:
    layers = sizes.layers * sizes.share_gathered
    others = sizes.others * sizes.share_gathered
    return formulas.zero_3(DEVICES, layers, others, sizes.parameters)


def _tensor(sizes: Sizes) -> float:
    return formulas.tensor(DEVICES, sizes.num_layers, sizes.hidden)


def _expert(sizes: Sizes) -> float:
    choices = CHOICES * sizes.hidden / DEVICES
    return formulas.expert(DEVICES, sizes.num_layers, choices)


def _pipeline(sizes: Sizes) -> float:
    # A microbatch has a row.
    hidden = sizes.hidden / sizes.microbatches
    return formulas.pipeline(sizes.microbatches, 1, hidden)


def _with_tokens_sharded(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, sequence_parallel=True)


def _with_experts(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, experts=EXPERTS)


def _exchange(kind: str, all_to_all: int = 1) -> Callable[[ModelConfig], ModelConfig]:
    """Returns what gives a model's attention an exchange of keys."""
    exchange = KeyExchange(kind, all_to_all)

    def change(model: ModelConfig) -> ModelConfig:
        attention = dataclasses.replace(model.attention, exchange=exchange)
        return dataclasses.replace(model, attention=attention)

    return change


def _mesh(axis: str, zero: int = 3) -> MeshConfig:
    sizes = {"data": 1, axis: DEVICES}
    return MeshConfig(**sizes, zero=zero)


# Gradients of a few megabytes are summed each alone: several together are not scattered.
NOT_COMBINED = ("xla_tpu_ars_combiner_threshold_in_bytes=0",)
# What a mesh axis shards beside its own exchange, such as parameters over `context`, is counted
# apart; at level 1 it is outside the layers.
ATTENTION = "exchange_and_attend"
CASES = {
    "data": Case(_mesh("data"), lambda s: formulas.data(DEVICES, s.parameters)),
    "fsdp, zero 1": Case(
        _mesh("fsdp", 1), lambda s: formulas.zero_1(DEVICES, s.parameters, s.parameters)
    ),
    "fsdp, zero 2": Case(
        _mesh("fsdp", 2), lambda s: formulas.zero_2(DEVICES, s.parameters, s.parameters)
    ),
    "fsdp, zero 3": Case(_mesh("fsdp"), _zero_3),
    "fsdp, zero 2, not combined": Case(
        _mesh("fsdp", 2),
        lambda s: formulas.zero_2(DEVICES, s.parameters, s.parameters),
        tpu_options=NOT_COMBINED,
    ),
    "fsdp, zero 3, not combined": Case(_mesh("fsdp"), _zero_3, tpu_options=NOT_COMBINED),
    "tensor": Case(_mesh("tensor"), _tensor),
    "tensor, sequence_parallel": Case(_mesh("tensor"), _tensor, change=_with_tokens_sharded),
    "context, ring": Case(
        _mesh("context", 1),
        lambda s: formulas.ring(DEVICES, s.num_layers, s.heads, s.heads),
        ATTENTION,
    ),
    "context, all_gather": Case(
        _mesh("context", 1),
        lambda s: formulas.gathered_keys(DEVICES, s.num_layers, s.heads),
        ATTENTION,
        _exchange("all_gather"),
    ),
    "context, all_to_all": Case(
        _mesh("context", 1),
        lambda s: formulas.heads_for_tokens(DEVICES, s.num_layers, s.heads, s.heads),
        ATTENTION,
        _exchange("ring", DEVICES),
    ),
    "expert": Case(_mesh("expert", 1), _expert, "all_to_all", _with_experts),
    "pipeline, 32 microbatches": Case(
        _mesh("pipeline"), _pipeline, "ppermute", microbatches=4 * DEVICES
    ),
    "pipeline, 128 microbatches": Case(
        _mesh("pipeline"), _pipeline, "ppermute", microbatches=16 * DEVICES
    ),
}


def build(case: Case, model: ModelConfig, devices: Any = None) -> Program:
    """Returns the programs of a case."""
    train = TrainConfig(
        steps=1_000_000,
        batch_size=max(ROWS, case.microbatches),
        sequence_length=model.max_length,
        accumulation=case.microbatches,
    )
    optim = OptimConfig(schedule=ScheduleConfig(name="constant"))
    return language_model_program(case.change(model), optim, train, case.mesh, devices)


def sizes_of(program: Program, model: ModelConfig, microbatches: int) -> Sizes:
    """Returns the bytes of a program's arrays."""
    layers = 0.0
    others = 0.0
    for name, leaf in named_leaves(program.state.params).items():
        if name.startswith("layers"):
            layers += leaf.size * leaf.dtype.itemsize
        else:
            others += leaf.size * leaf.dtype.itemsize

    number = 2 if model.dtype == "bfloat16" else 4
    tokens = program.batch["tokens"].size
    heads = model.attention.num_heads * model.attention.head_dim
    return Sizes(
        layers=layers,
        others=others,
        number=number,
        hidden=float(tokens * model.embed_dim * number),
        heads=tokens * heads * number / DEVICES,
        num_layers=model.num_layers,
        microbatches=microbatches,
    )


def volume(name: str, platform: str) -> dict[str, float]:
    """Returns the bytes that a device sends in a step of a case: those of its own parallelism
    (`sent`), by its formula (`formula`), of what else is sharded (`rest`), and of small collectives
    (`small`).
    """
    case = CASES[name]
    model = MODEL
    devices = None
    if platform == "tpu":
        model = TPU_MODEL
        # What is compiled for other devices cannot be read back.
        jax.config.update("jax_enable_compilation_cache", False)
        devices = tpu_devices(TPU)
        mesh = dataclasses.replace(case.mesh, compiler_options=case.tpu_options)
        case = dataclasses.replace(case, mesh=mesh)
    program = build(case, model, devices)
    found = collectives(program.compile_train_step().as_text(), program.mesh)
    sizes = sizes_of(program, case.change(model), case.microbatches)
    return {**split_volume(found, case), "formula": case.formula(sizes)}


def split_volume(found: tuple[Collective, ...], case: Case) -> dict[str, float]:
    """Returns what collectives send: `sent`, `rest` and `small` of `volume`."""
    volumes = {"sent": 0.0, "rest": 0.0, "small": 0.0}
    for collective in found:
        sent = collective.volume
        if case.microbatches > 1 and collective.kind == "collective-permute":
            sent *= sending_share(case)
        if collective.operand_bytes < SMALL and collective.result_bytes < SMALL:
            part = "small"
        elif case.source in collective.op_name:
            part = "sent"
        else:
            part = "rest"
        volumes[part] += sent
    return volumes


def sending_share(case: Case) -> float:
    """Returns the share of a pipeline's ticks in which its devices send, forward or backward.

    The loop over the ticks sends in a branch, which a reader of the program counts in every tick;
    the tables say in which it is taken.
    """
    schedule = make_schedule("1f1b", case.mesh.pipeline, case.microbatches)
    tables = make_tables(schedule)
    sends = tables.sends_forward.sum() + tables.sends_backward.sum()
    return float(sends) / (2 * len(schedule.ticks))


# The model whose steps are timed.
TIMED = dataclasses.replace(
    MODEL, num_layers=4, embed_dim=256, mlp=MlpConfig(1024), layer_loop="auto"
)


def timed_step(name: str) -> Callable[[], float]:
    """Returns a step of a case, or of one device; it returns the loss."""
    devices = None
    case = CASES.get(name)
    if case is None:
        case = Case(MeshConfig(), lambda sizes: 0.0)
        devices = jax.devices()[:1]
    program = build(case, TIMED, devices)
    step = program.compile_train_step()
    state = program.create(jax.random.key(0))
    batch = shard_batch(_random_batch(program), program.batch)

    def take() -> float:
        nonlocal state
        state, metrics = step(state, {}, batch)
        return float(metrics["loss"])

    return take


def _random_batch(program: Program) -> dict[str, np.ndarray]:
    """Returns rows of random tokens, each one document."""
    rng = np.random.default_rng(0)
    batch = {}
    for name, leaf in program.batch.items():
        if name in ("tokens", "targets"):
            array = rng.integers(TIMED.vocab_size, size=leaf.shape)
        elif name == "positions":
            array = np.broadcast_to(np.arange(leaf.shape[1]), leaf.shape)
        else:
            array = np.ones(leaf.shape)
        batch[name] = array.astype(leaf.dtype)
    return batch
