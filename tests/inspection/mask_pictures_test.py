"""Pictures of attention masks show what the state of a token depends on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.data.batch import model_inputs
from research.inspection import mask_pictures
from research.models.config import LayerConfig, ModelConfig
from research.models.transformer import Transformer
from tests.models.variants import VARIANTS
from tests.tiny import random_params, tiny_config

# Variants that cover what masks depend on.
MASKED = ("windows", "local encoder", "prefix", "encoder-decoder")


def dependence(config: ModelConfig, batch: dict[str, jnp.ndarray], name: str) -> np.ndarray:
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
        if picture.mask.stack == "encoder":
            continue  # its mask shows in the decoder, as that of cross-attention
        cross = picture.mask.stack == "cross-attention"
        one = dataclasses.replace(
            config,
            num_layers=1,
            encoder_layers=min(config.encoder_layers, 1),
            first_layers=(),
            pattern=(config.layers()[picture.mask.layers[0]],),
        )
        found.append((picture, dependence(one, batch, "encoder_tokens" if cross else "tokens")))
    return found


@pytest.mark.parametrize("name", MASKED)
def test_picture_is_the_mask_of_the_model(name: str):
    for picture, changes in pictured(name):
        real = picture.queries != 0
        seen = picture.visible | (
            np.eye(16, dtype=bool) & (picture.mask.stack != "cross-attention")
        )
        np.testing.assert_array_equal(seen[real], changes[real], err_msg=picture.mask.title)


def test_picture_of_another_window_is_not_the_mask_of_the_model():  # the control
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


def test_cells_show_documents_padding_and_what_a_prefix_unmasks():
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


def test_masks_name_their_layers():
    windows = (LayerConfig(window=4), LayerConfig())
    config = tiny_config(num_layers=5, max_length=64, pattern=windows)
    found = [(mask.layers, mask.window, mask.text) for mask in mask_pictures.layer_masks(config)]
    assert found == [
        ((0, 2, 4), 4, "causal attention, sliding window of 4 tokens (itself included)"),
        ((1, 3), None, "causal attention"),
    ]
    titles = [mask.title for mask in mask_pictures.layer_masks(VARIANTS["encoder-decoder"])]
    assert titles == ["encoder, layers 0–2", "decoder, layers 0–1", "cross-attention, layers 0–1"]
