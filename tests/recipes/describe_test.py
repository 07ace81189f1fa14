"""What `describe` says of a model is what the model is: its parameters, and who sees whom."""

import dataclasses
import functools
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from research import cli
from research.core import config as configs
from research.core.trees import count, named_leaves
from research.data.batch import model_inputs
from research.inspection import mask_pictures, parameter_summary
from research.models.config import LayerConfig, ModelConfig
from research.models.flops import matmul_parameters
from research.models.transformer import Transformer
from research.recipes import describe
from tests.models.variants import VARIANTS
from tests.recipes import runs
from tests.tiny import abstract_params, random_params, tiny_config

MODELS = runs.ROOT / "configs" / "model"
PRESETS = (
    "llama.py:3.1-405b",
    "deepseek.py:v3-671b-mtp",
    "t5.py:base",
    "gemma.py:3-1b",
    "modernbert.py:base",
)
# Variants that sum up what masks depend on.
SIGHTED = ("windows", "local encoder", "prefix", "encoder-decoder")


def tell(capsys, *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main(["describe", *argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def printed_sum(lines: list[str]) -> int:
    """The sum of the tree's outermost counts, as they are printed."""
    return sum(int(line.split()[-1].replace(",", "")) for line in lines if line[0] in "├└")


def printed_module_sums(part: parameter_summary.Part) -> bool:
    """Whether each module holds as many parameters as its parts."""
    own = part.each == sum(inner.count for inner in part.parts) if part.parts else True
    return own and all(map(printed_module_sums, part.parts))


@pytest.mark.fast_cases(
    "windows", "sinks", "shared experts", "latent", "encoder-decoder", "encoder"
)
@pytest.mark.parametrize("name", VARIANTS)
def test_tree_holds_every_parameter_of_the_model(name: str):
    config = VARIANTS[name]
    model, params = parameter_summary.take_apart(config), nn.unbox(abstract_params(config))
    assert model.count == count(params)
    assert printed_sum(parameter_summary.tree_lines(model)) == model.count
    assert printed_module_sums(model)
    # Not only as many: each shape as often as the model has it.
    held: dict[tuple[int, ...], int] = {}
    for _, part, number in model.parameters():
        held[part.shape] = held.get(part.shape, 0) + number
    shapes = [leaf.shape for leaf in named_leaves(params).values()]
    assert held == {shape: shapes.count(shape) for shape in set(shapes)}


def test_tree_tells_a_missing_parameter():  # the control
    config = VARIANTS["sinks"]
    without = dataclasses.replace(
        config, attention=dataclasses.replace(config.attention, sinks=False)
    )
    assert parameter_summary.take_apart(without).count != count(nn.unbox(abstract_params(config)))


@pytest.mark.parametrize("preset", PRESETS)
def test_tree_of_a_preset_holds_every_parameter(preset: str):
    config = describe.load_model(str(MODELS / preset), [])
    scanned = dataclasses.replace(config, layer_loop="scan")
    assert parameter_summary.take_apart(config).count == count(nn.unbox(abstract_params(scanned)))


def matrices(config: ModelConfig) -> int:
    """Weights of the tree that a token is multiplied with, of experts those that it goes to, and
    the head's.
    """
    total = config.embed_dim * config.vocab_size
    for path, part, number in parameter_summary.take_apart(config).parameters():
        if part.name == "kernel" and "pooler" not in path:
            idle = config.experts is not None and "expert" in part.axes
            share = config.experts.experts_per_token / config.experts.num_experts if idle else 1
            total += round(part.each * number * share)
    return total


@pytest.mark.parametrize(
    "name", ["soft caps", "shared experts", "latent", "latent, direct queries", "encoder"]
)
def test_matrices_of_the_tree_are_those_that_flops_are_counted_of(name: str):
    assert matrices(VARIANTS[name]) == matmul_parameters(VARIANTS[name])


def test_active_parameters_leave_out_the_experts_that_a_token_does_not_meet():
    config = VARIANTS["shared experts"]
    model, experts = parameter_summary.take_apart(config), config.experts
    one_expert = 3 * config.embed_dim * experts.hidden_dim
    idle = 2 * (experts.num_experts - experts.experts_per_token) * one_expert
    assert parameter_summary.active_parameters(config, model) == model.count - idle


def test_cache_numbers_count_keys_and_values_of_all_layers():
    assert parameter_summary.cache_numbers(tiny_config()) == (2 * 2 * 2 * 4, 0)
    assert parameter_summary.cache_numbers(VARIANTS["latent"]) == (2 * (6 + 4), 0)
    assert parameter_summary.cache_numbers(VARIANTS["encoder-decoder"]) == (
        2 * 2 * 2 * 4,
        2 * 2 * 2 * 4,
    )


def test_layers_are_named_by_runs():
    assert parameter_summary.layers_name([0]) == "layer 0"
    assert parameter_summary.layers_name([0, 1, 2, 5]) == "layers 0–2, 5"
    assert parameter_summary.layers_name(list(range(0, 26, 2))) == "layers 0, 2, …, 24"


def who_changes(config: ModelConfig, batch: dict[str, jnp.ndarray], name: str) -> np.ndarray:
    """[T, S]: whether the state of token t changes with token s of the input `name`."""
    params = jax.tree.map(jnp.asarray, random_params(config))

    @jax.jit
    def hidden(tokens: jax.Array) -> jax.Array:
        return (
            Transformer(config)
            .apply({"params": params}, model_inputs(batch) | {name: tokens})
            .hidden[0]
        )

    tokens = batch[name]
    changed = jax.vmap(lambda s: hidden(tokens.at[0, s].set((tokens[0, s] + 7) % 48)))(
        jnp.arange(tokens.shape[1])
    )
    return np.asarray(jnp.abs(changed - hidden(tokens)[None]).max(axis=-1) > 1e-4).T


@functools.cache
def pictured(name: str) -> list[tuple[mask_pictures.MaskPicture, np.ndarray]]:
    """Pictures of a variant beside what a model of that layer alone does."""
    config, found = VARIANTS[name], []
    row, memory = (mask_pictures.packed_row(16, part) for part in ((9, 5), (6, 8)))
    batch = {
        "tokens": jnp.asarray(np.arange(16)[None] % 48),
        "positions": row.positions,
        "segments": row.segments,
    }
    batch |= {"prefix": row.prefix, "encoder_tokens": batch["tokens"]}
    batch |= {"encoder_positions": memory.positions, "encoder_segments": memory.segments}
    batch = {key: jnp.atleast_2d(jnp.asarray(value, jnp.int32)) for key, value in batch.items()}
    if config.structure != "encoder_decoder":
        batch = {key: value for key, value in batch.items() if not key.startswith("encoder")}
    for picture in mask_pictures.mask_pictures(config, 16):
        if picture.layers.startswith("encoder"):
            continue  # what it sees is seen through the decoder, as cross-attention's
        windows = [layer for layer in config.layers() if wording_has(picture.sight, layer.window)]
        cross = picture.layers.startswith("cross")
        one = dataclasses.replace(
            config,
            num_layers=1,
            encoder_layers=min(config.encoder_layers, 1),
            first_layers=(),
            pattern=(windows[0] if windows else LayerConfig(),),
        )
        found.append((picture, who_changes(one, batch, "encoder_tokens" if cross else "tokens")))
    return found


def wording_has(sight: str, window: int | None) -> bool:
    return (f"window {window}:" in sight) if window is not None else "window" not in sight


@pytest.mark.parametrize("name", SIGHTED)
def test_picture_shows_whom_the_model_sees(name: str):
    for picture, changes in pictured(name):
        real = picture.queries != 0
        seen = picture.visible | (np.eye(16, dtype=bool) & ("cross" not in picture.layers))
        np.testing.assert_array_equal(seen[real], changes[real], err_msg=picture.layers)


def test_picture_of_another_window_is_not_what_the_model_sees():  # the control
    picture, changes = pictured("windows")[0]
    other = mask_pictures.mask_pictures(tiny_config(pattern=(LayerConfig(window=5),)), 16)[0]
    real = picture.queries != 0
    assert not np.array_equal(other.visible[real], changes[real])


@pytest.mark.parametrize("structure", ["decoder", "encoder"])
@pytest.mark.parametrize("window", [None, 1, 30, 257])
def test_large_picture_is_every_step_th_token_of_the_dense_mask(structure: str, window: int | None):
    config = tiny_config(
        structure=structure, max_length=1024, pattern=(LayerConfig(window=window),)
    )
    (picture,) = mask_pictures.mask_pictures(config, 640)
    assert picture.step == 10
    assert picture.visible.shape == (64, 64)
    segments = np.repeat(picture.queries, picture.step)
    index = np.arange(640)
    distance = index[:, None] - index[None]
    whole = (segments[:, None] == segments) & (segments != 0)
    whole &= (distance >= 0) if structure == "decoder" else True
    whole &= (np.abs(distance) < window) if window is not None else True
    np.testing.assert_array_equal(picture.visible, whole[:: picture.step, :: picture.step])


def test_cells_tell_documents_padding_and_what_a_prefix_shows():
    (picture,) = mask_pictures.mask_pictures(VARIANTS["prefix"], 32)
    cells = picture.cells()
    assert cells[0, 0] == cells[17, 3] == mask_pictures.FIRST
    assert cells[0, 5] == mask_pictures.FIRST_AHEAD
    assert cells[0, 6] == cells[5, 6] == cells[20, 3] == mask_pictures.HIDDEN
    assert cells[18, 20] == mask_pictures.SECOND_AHEAD
    assert cells[27, 18] == mask_pictures.SECOND
    assert (cells[28:] == mask_pictures.PADDING).all()
    assert (cells[:, 28:] == mask_pictures.PADDING).all()


def test_row_shows_windows_open_and_close():
    assert mask_pictures.row_length(tiny_config(), None) == 32
    windowed = tiny_config(max_length=9000, pattern=(LayerConfig(window=1000),))
    assert mask_pictures.row_length(windowed, None) == 4000
    (picture,) = mask_pictures.mask_pictures(windowed, 4000)
    causal = np.tril(picture.queries[:, None] == picture.keys) & (picture.keys != 0)
    for document in (1, 2):
        own = picture.queries == document
        assert (causal & ~picture.visible)[own].any()


def test_config_and_workdir_are_told_and_drawn(tiny: pathlib.Path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, out, err = tell(capsys, f"--config={tiny}", "--config.model.num_layers=5")
    assert status == 0
    assert out.startswith(
        "decoder, 5 layers, width 16, 4 query heads sharing 2 key/value heads of 4, vocabulary "
        "384, "
    )
    assert re.search(r"layers 0–4 +5 × ", out)
    assert f"describe/{tiny.stem}/attention.png" in err
    drawn = tmp_path / "describe" / tiny.stem / "attention.png"
    with Image.open(drawn) as image:
        assert image.size[0] > 500
        assert len(image.convert("RGB").getcolors(1 << 20)) > 4
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_text(configs.to_json({"model": VARIANTS["encoder-decoder"]}))
    status, out, _ = tell(capsys, f"--workdir={workdir}")
    assert status == 0
    assert out.startswith("encoder-decoder, 3 and 2 layers, ")
    assert (workdir / "plots" / "attention.png").is_file()


@pytest.mark.fast_cases(
    "windows", "sinks", "shared experts", "latent", "encoder-decoder", "encoder"
)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_a_report(name: str):
    assert all(
        line == line.rstrip() or line[0] in "├└│ "
        for line in describe.report(VARIANTS[name])
        if line
    )


def test_mistakes_get_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    preset = f"--config={MODELS}/llama.py"
    wrong = {
        (f"--config={MODELS}/lama.py",): "is not a file",
        (f"--config={MODELS}/llama.py:3-8c",): "'3-8b'",
        (preset, "--config.num_layer=3"): "Did you mean 'num_layers'?",
        (preset, "--config.model.num_layers=3"): "say --config.num_layers",
        (preset, "--length=15"): "--length = 15 must lie in [16, ",
        (preset, "--length=999999"): "max_length = 131072",
        (preset, f"--out={tmp_path}/file/here"): "cannot be written",
        (preset, f"--workdir={tmp_path}"): "either --config or --workdir",
        (): "either --config or --workdir",
        (f"--workdir={tmp_path}",): "is not a workdir",
        (f"--workdir={tmp_path}", "--config.num_layers=3"): "--config.num_layers",
    }
    for argv, message in wrong.items():
        status, out, err = tell(capsys, *argv)
        assert (status, out, err.count("\n")) == (2, "", 1), err
        assert message in err
