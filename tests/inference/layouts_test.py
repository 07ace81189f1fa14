"""On accelerators parameters lie in the order that steps read them in."""

import dataclasses
from typing import Any

import jax
import pytest
from jax.experimental.layout import Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.core.trees import named_leaves
from research.data.tokenizers import ByteTokenizer
from research.inference import layouts
from research.inference.engine import Engine
from research.inference.layouts import chosen_layouts, formatted, step_layouts
from research.inference.lowered_step import StepSizes, lower_step
from research.inference.requests import Request
from research.inference.sampling_config import SamplingConfig
from research.inference.serve_config import ServeConfig
from research.models.config import AttentionConfig, MlpConfig, ModelConfig
from research.models.language_model import abstract_params
from research.parallel.mesh import make_mesh
from research.parallel.mesh_config import MeshConfig
from research.scaling.topology import tpu_devices
from tests.models.variants import VARIANTS
from tests.tiny import random_params, tiny_config

CONFIG = tiny_config(vocab_size=260, max_length=32)
SERVE = ServeConfig(slots=2, tokens=64, rows=8, tiles=(8,))
# No order that CPU devices have by themselves.
TURNED = {
    "layers/attention/query/kernel": Layout((2, 1, 0)),
    "layers/mlp/down/kernel": Layout((1, 0)),
}
SIZES = StepSizes(slots=16, tokens=32_768, tile=16, rows=64)


def orders(params) -> dict[str, tuple[int, ...]]:
    """The order of axes of the parameters that lie in another than JAX's own."""
    found = {}
    for name, leaf in named_leaves(params).items():
        order = leaf.format.layout.major_to_minor
        if order != tuple(range(leaf.ndim)):
            found[name] = order
    return found


def logprobs(engine: Engine) -> list[float]:
    asked = Request((1, 2, 3), SamplingConfig(temperature=0.0, max_tokens=6))
    [answer] = engine.run([asked])
    return [each.logprob for each in answer.samples[0].logprobs]


@pytest.fixture
def turned(monkeypatch):
    monkeypatch.setattr(layouts, "platform", lambda: "tpu")
    monkeypatch.setattr(layouts, "chosen_layouts", lambda *_: TURNED)


def test_an_engine_reads_parameters_as_it_laid_them_out(turned, monkeypatch, caplog):
    params = jax.tree.map(jax.numpy.asarray, random_params(CONFIG))
    engine = Engine(CONFIG, params, ByteTokenizer(), SERVE)
    expected = {}
    for kind, layout in TURNED.items():
        for index in range(CONFIG.num_layers):
            expected[kind.replace("layers", f"layers_{index}")] = layout.major_to_minor
    [replica] = engine.replicas
    assert orders(replica.params) == expected
    assert not orders(params)
    first = logprobs(engine)

    other = random_params(CONFIG, seed=1)
    engine.update_params(other)
    assert orders(replica.params) == expected
    second = logprobs(engine)
    assert "compiled while serving" not in caplog.text

    monkeypatch.undo()
    for own, found in ((params, first), (other, second)):
        engine = Engine(CONFIG, own, ByteTokenizer(), SERVE)
        assert not orders(engine.replicas[0].params)
        assert logprobs(engine) == pytest.approx(found, abs=1e-5)


def test_each_replica_has_them_on_its_own_devices(turned):
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = jax.device_put(random_params(CONFIG), everywhere)
    engine = Engine(CONFIG, params, ByteTokenizer(), SERVE, mesh)
    found = []
    for replica in engine.replicas:
        assert len(orders(replica.params)) == len(TURNED) * CONFIG.num_layers
        found.append({leaf.device for leaf in jax.tree.leaves(replica.params)})
    assert found == [{device} for device in jax.devices()[:2]]
    one, other = (logprobs(engine) for _ in range(2))
    assert one == other


def test_a_choice_is_made_once_and_for_the_device_of_the_parameters(monkeypatch):
    monkeypatch.setattr(layouts, "platform", lambda: "tpu")
    params = jax.device_put(random_params(CONFIG), jax.devices()[1])
    chosen = step_layouts(CONFIG, params, None, SERVE)
    assert step_layouts(CONFIG, params, None, SERVE) is chosen
    engine = Engine(CONFIG, params, ByteTokenizer(), SERVE)
    found = {leaf.device for leaf in jax.tree.leaves(engine.replicas[0].params)}
    assert found == {jax.devices()[1]}


def test_devices_that_tell_nothing_keep_jax_s_own(monkeypatch):
    def tell_nothing(*_):
        raise NotImplementedError("no layouts here")

    monkeypatch.setattr(layouts, "platform", lambda: "gpu")
    monkeypatch.setattr(layouts, "chosen_layouts", tell_nothing)
    params = jax.device_put(random_params(CONFIG), jax.devices()[0])
    assert step_layouts(CONFIG, params, None, SERVE) == {}


def on_chip(config: ModelConfig, chip: str) -> tuple[Mesh, Any]:
    """A mesh of one TPU, and the shapes of a model's parameters on it."""
    pytest.importorskip("libtpu", reason="needs the extra `tpu`")
    mesh = make_mesh(MeshConfig(data=1), [tpu_devices(chip)[0]])
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return leaf.update(sharding=everywhere)

    return mesh, jax.tree.map(place, abstract_params(config, "tpu"))


@pytest.mark.compilers
@pytest.mark.parametrize("name", ["encoder-decoder", "multi-token prediction"])
def test_what_a_step_does_not_read_has_no_layout(name: str):
    config = dataclasses.replace(VARIANTS[name], layer_loop="scan")
    mesh, params = on_chip(config, "v5e")
    sizes = StepSizes(slots=2, tokens=128, tile=8, rows=8)
    unread = [part for part in params if part.startswith(("encoder", "future"))]
    compiled = lower_step(config, params, mesh, sizes).lowered.compile()
    (formats, *_), _ = compiled.input_formats
    untold = {leaf.layout for part in unread for leaf in jax.tree.leaves(formats[part])}
    assert None in untold
    found = chosen_layouts(config, params, mesh, sizes)
    assert not [kind for kind in found if kind.startswith(("encoder", "future"))]


def decoder(**changes) -> ModelConfig:
    return ModelConfig(
        max_length=2048,
        layer_loop="scan",
        dtype="bfloat16",
        param_dtype="bfloat16",
        **changes,
    )


# Heads of whole tiles, as LLaMA's of 8 B parameters: their axes lie between those of a product.
WHOLE_TILES = decoder(
    vocab_size=128_256,
    num_layers=4,
    embed_dim=4096,
    attention=AttentionConfig(32, 8, 128),
    mlp=MlpConfig(hidden_dim=14_336),
)
# A width of no whole tiles: by itself JAX puts such matrices column by column.
ODD_WIDTH = decoder(
    vocab_size=49_152,
    num_layers=30,
    embed_dim=576,
    attention=AttentionConfig(9, 3, 64),
    mlp=MlpConfig(hidden_dim=1536),
)


@pytest.mark.compilers
@pytest.mark.parametrize(
    ("config", "chip"),
    [(WHOLE_TILES, "v5e"), (ODD_WIDTH, "v5p")],
    ids=["whole tiles, v5e", "odd width, v5p"],
)
def test_a_step_on_a_tpu_copies_no_parameter(config: ModelConfig, chip: str):
    mesh, params = on_chip(config, chip)

    def temporaries(params) -> int:
        compiled = lower_step(config, params, mesh, SIZES).lowered.compile()
        return compiled.memory_analysis().temp_size_in_bytes

    layouts = step_layouts(config, params, mesh, ServeConfig())
    key = params["layers"]["attention"]["key"]["kernel"]
    key_bytes = key.size * key.dtype.itemsize
    assert temporaries(params) > 2 * key_bytes  # the control
    assert temporaries(formatted(params, layouts)) < key_bytes
