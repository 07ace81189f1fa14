"""What is frozen stays as it is, bit for bit, and costs no moments; what is chosen is trained."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import UserError
from research.core.trees import named_leaves
from research.models.config import HeadConfig, LayerConfig, ModelConfig
from research.optim.optimizers import OptimConfig
from research.optim.schedules import ScheduleConfig
from research.parallel.mesh_config import MeshConfig
from research.parallel.parameter import logical_axes
from research.training.config import TrainConfig
from research.training.language_model import language_model_program
from research.training.partition import EVERYTHING, TrainableConfig, build_partition
from research.training.program import Program
from research.training.state import TrainState
from research.training.step import shard_batch
from tests.tiny import abstract_params, random_batch, tiny_config

MODEL = tiny_config(num_layers=3, attention={"qkv_bias": True}, layer_loop="unroll")
BIAS = "layers_1/attention/query/bias"
ONE_BIAS = TrainableConfig("pattern", pattern=BIAS)
STEPS = 10


def program_of(
    trainable: TrainableConfig, ema: bool = False, model: ModelConfig = MODEL, devices: int = 1
) -> Program:
    optim = OptimConfig(
        learning_rate=0.01, schedule=ScheduleConfig(name="constant"), ema_decay=0.5 if ema else None
    )
    train = TrainConfig(steps=STEPS, batch_size=2, sequence_length=8, trainable=trainable)
    mesh = MeshConfig(fsdp=devices)
    return language_model_program(model, optim, train, mesh, jax.devices()[:devices])


@functools.cache
def trained(
    trainable: TrainableConfig, ema: bool = False, devices: int = 1
) -> tuple[Program, Any, Any, TrainState]:
    """The program, the parameters at the beginning and at the end, and the last state."""
    program = program_of(trainable, ema, devices=devices)
    state, frozen = program.resume_or_create(None, jax.random.key(0))
    first = jax.tree.map(np.array, program.merge(state, frozen).params)
    step = program.compile_train_step()
    for index in range(STEPS):
        state, _ = step(state, frozen, shard_batch(random_batch(2, 8, index), program.batch))
    return program, first, program.merge(state, frozen), state


def changed(first: Any, last: Any) -> list[str]:
    """Names of the arrays that are not bitwise the same."""
    before, after = named_leaves(first), named_leaves(last)
    assert before.keys() == after.keys()
    return [name for name in before if before[name].tobytes() != np.asarray(after[name]).tobytes()]


def test_all_but_one_bias_are_bitwise_as_they_were_and_have_no_moments():
    _, first, saved, state = trained(ONE_BIAS)
    assert changed(first, saved.params) == [BIAS]
    bias = named_leaves(first)[BIAS]
    assert set(named_leaves(state.params)) == {BIAS}
    moments = {name: leaf for name, leaf in named_leaves(state.opt_state).items() if leaf.ndim}
    assert len(moments) == 2  # the first and the second
    assert {leaf.shape for leaf in moments.values()} == {bias.shape}
    assert all(name.endswith(BIAS) for name in moments)


def test_everything_moves_where_nothing_is_frozen():
    program, first, saved, _ = trained(TrainableConfig())
    assert program.partition is EVERYTHING
    assert set(changed(first, saved.params)) == set(named_leaves(first))


@pytest.mark.thorough
def test_frozen_parameters_may_be_bfloat16_and_lie_on_the_mesh_by_the_table():
    half = dataclasses.replace(ONE_BIAS, frozen_dtype="bfloat16")
    program, first, saved, _ = trained(half, devices=2)
    assert {leaf.dtype for leaf in jax.tree.leaves(program.frozen)} == {jnp.dtype("bfloat16")}
    assert changed(first, saved.params) == [BIAS]
    # What is saved is of the parameters' own type, so that whoever reads a run need not know.
    assert {leaf.dtype for leaf in jax.tree.leaves(saved.params)} == {jnp.dtype("float32")}
    frozen, everything = (
        named_leaves(program.frozen),
        named_leaves(program_of(TrainableConfig(), devices=2).state.params),
    )
    assert all(frozen[name].sharding == everything[name].sharding for name in frozen)
    assert any(not leaf.sharding.is_fully_replicated for leaf in frozen.values())


def test_single_rows_of_the_embedding_are_trained():
    rows = TrainableConfig("embedding_rows", rows=(3, 40))
    _, first, saved, state = trained(rows, ema=True)
    assert changed(first, saved.params) == changed(first, saved.ema) == ["embed/embedding"]
    before, after = first["embed"]["embedding"], np.asarray(saved.params["embed"]["embedding"])
    moved = [row for row in range(len(before)) if before[row].tobytes() != after[row].tobytes()]
    assert moved == [3, 40]
    assert {leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim} == {
        (2, MODEL.embed_dim)
    }


@pytest.mark.parametrize(
    "trainable",
    [ONE_BIAS, TrainableConfig("embedding_rows", rows=(3, 40), frozen_dtype="bfloat16")],
    ids=["a bias", "rows, the rest in bfloat16"],
)
def test_a_saved_state_is_taken_apart_as_it_was(trainable: TrainableConfig):
    program = program_of(trainable, ema=True)
    state, frozen = program.resume_or_create(None, jax.random.key(0))
    again = program.split(program.merge(state, frozen))
    for x, y in zip(jax.tree.leaves((state, frozen)), jax.tree.leaves(again), strict=True):
        assert (x.dtype, x.sharding) == (y.dtype, y.sharding)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_an_array_of_which_rows_are_trained_is_not_untouched():
    everything = set(named_leaves(program_of(ONE_BIAS).saved.params))
    for config, touched in (
        (TrainableConfig("embedding_rows", rows=(3, 40)), "embed/embedding"),
        (ONE_BIAS, BIAS),
    ):
        program = program_of(config)
        assert program.partition.frozen_names(program.saved.params) == everything - {touched}
    assert program_of(TrainableConfig()).partition.frozen_names(program.saved.params) == frozenset()


def test_a_saved_state_of_a_later_step_keeps_the_average_apart_from_the_parameters():
    program, _, saved, state = trained(TrainableConfig("embedding_rows", rows=(3, 40)), ema=True)
    assert int(state.step) == STEPS
    assert changed(state.params, state.ema) == [
        "embed/embedding"
    ]  # so that one in the place of the other is seen

    for whole, part in ((saved.params, state.params), (saved.ema, state.ema)):
        rows = np.asarray(whole["embed"]["embedding"])[[3, 40]]
        np.testing.assert_array_equal(rows, np.asarray(part["embed"]["embedding"]))
    again, frozen = program.split(saved)
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), again, state
    )
    untrained = {
        name: leaf for name, leaf in named_leaves(frozen).items() if name != "embed/embedding"
    }
    for name, leaf in untrained.items():
        np.testing.assert_array_equal(
            np.asarray(leaf), np.asarray(named_leaves(saved.params)[name]), err_msg=name
        )


def selected(config: TrainableConfig, model: ModelConfig) -> dict[str, Any]:
    selection = build_partition(config, abstract_params(model)).selection
    assert selection is not None
    return selection


def test_each_choice_names_what_it_says():
    model = dataclasses.replace(
        MODEL, first_layers=(LayerConfig(),), head=HeadConfig(bias=True, transform=True)
    )
    everything = set(named_leaves(logical_axes(abstract_params(model))))
    heads = selected(TrainableConfig("heads"), model)
    assert {name.partition("/")[0] for name in heads} == {"unembed", "logit_bias", "transform"}

    biases = selected(TrainableConfig("biases"), model)
    assert "logit_bias" in biases
    assert f"{BIAS}" in biases
    assert all(name.endswith("bias") for name in biases)
    assert {name for name in everything if name.endswith("bias")} == set(biases)

    last = selected(TrainableConfig("last_layers", num_layers=2), model)
    assert {name.partition("/")[0] for name in last} == {"layers_0", "layers_1"}
    most = selected(TrainableConfig("last_layers", num_layers=3), model)
    assert {name.partition("/")[0] for name in most} == {"first_layers_0", "layers_0", "layers_1"}


def test_last_layers_of_a_scanned_stack_are_rows_of_it():
    scanned = dataclasses.replace(MODEL, layer_loop="scan")
    last = selected(TrainableConfig("last_layers", num_layers=2), scanned)
    assert set(last.values()) == {(1, 2)}
    assert all(name.startswith("layers/") for name in last)
    state = program_of(TrainableConfig("last_layers", num_layers=2), model=scanned).state
    assert {leaf.shape[0] for leaf in jax.tree.leaves(state.params)} == {2}


def test_both_stacks_of_an_encoder_decoder_have_last_layers():
    model = tiny_config(structure="encoder_decoder", encoder_layers=3)
    last = selected(TrainableConfig("last_layers"), model)
    assert {name.rpartition("layers_")[0] + name.rpartition("layers_")[2][0] for name in last} == {
        "encoder/2",
        "1",
    }


@pytest.mark.parametrize(
    ("config", "model", "said"),
    [
        (
            TrainableConfig("pattern", pattern="attn"),
            MODEL,
            r"pattern = 'attn' matches no parameter.*embed/embedding",
        ),
        (
            TrainableConfig("biases"),
            tiny_config(),
            "select = 'biases' matches no parameter, so everything",
        ),
        (
            TrainableConfig("heads"),
            tiny_config(tied_embeddings=True),
            "select = 'heads' matches no parameter",
        ),
        (
            TrainableConfig("embedding_rows", rows=(48,)),
            MODEL,
            "rows: 48 is not below model.vocab_size = 48",
        ),
    ],
)
def test_a_choice_of_nothing_is_refused_and_names_what_there_is(config, model, said):
    with pytest.raises(UserError, match=said):
        build_partition(config, abstract_params(model))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"select": "pattern"}, "^pattern = '' must be"),
        ({"select": "pattern", "pattern": "("}, r"^pattern = '\(' is not a regular expression"),
        ({"select": "embedding_rows"}, r"^rows = \(\) must name"),
        ({"select": "embedding_rows", "rows": (1, 1)}, r"^rows = \(1, 1\) must be different"),
        ({"select": "last_layers", "num_layers": 0}, "^num_layers = 0 must"),
    ],
)
def test_impossible_choices_are_refused(fields: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        TrainableConfig(**fields)
