"""What no step changes is written once, and checkpoints name it by folder and digest."""

import errno
import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import UserError
from research.core.trees import named_leaves
from research.models.canonical_params import canonical
from research.training import checkpoint_files as files
from research.training import checkpoint_frozen
from research.training.checkpoint_stream import ParamsReader
from research.training.checkpoints import Checkpoints
from tests.training.states import LAYERS, abstract, assert_same, new_state, write

# Whole stacks of layers but for the scales, of which one layer's is trained; the embedding.
KERNELS = [f"layers_{i}/mlp/{name}" for i in range(LAYERS) for name in ("kernel", "bias")]
FROZEN = ["embed", *KERNELS, "layers_0/scale"]
# How they lie on disk. The stack of scales holds a trained one.
RESTING = {"embed", "layers/mlp/kernel", "layers/mlp/bias"}


def saved_state(seed: int = 0, ema: bool = True):
    """A state whose average holds what is frozen as it is."""
    state = new_state(seed)
    return state.replace(ema=jax.tree.map(jnp.copy, state.params) if ema else None)


def trained(state):
    """The state after a step: of the parameters only a scale has moved."""
    moved = jax.tree.map(lambda leaf: leaf, state.params)
    moved["layers_1"]["scale"] = moved["layers_1"]["scale"] + 1
    return state.replace(params=moved)


@pytest.fixture
def opened(opened):
    def open_(frozen=FROZEN, **config) -> Checkpoints:
        return opened(frozen=frozen, **config)

    return open_


def bases(workdir: pathlib.Path) -> list[pathlib.Path]:
    return sorted((workdir / "checkpoints").glob("base-*"))


def size(folder: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def flip_a_bit(folder: pathlib.Path) -> None:
    """Of the largest file, which holds arrays' values."""
    path = max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("ema", [False, True])
def test_what_is_frozen_is_written_once_and_read_with_every_checkpoint(tmp_path, opened, ema):
    first = saved_state(ema=ema)
    second = trained(first)
    checkpoints = opened()
    write(checkpoints, 1, first)
    (base,) = bases(tmp_path)
    written = {path: path.stat().st_mtime_ns for path in base.rglob("*")}
    write(checkpoints, 2, second)
    assert {path: path.stat().st_mtime_ns for path in base.rglob("*")} == written

    for step, state in ((1, first), (2, second)):
        manifest = files.read_manifest(tmp_path / "checkpoints" / str(step))
        there = {
            name for name, array in manifest["arrays"].items() if array.get("place") == base.name
        }
        assert there == {
            f"{field}/{name}"
            for field in (["params", "ema"] if ema else ["params"])
            for name in RESTING
        }
        assert set(manifest["arrays"]) == set(canonical(state))
        _, restored, _ = opened().restore(abstract(state), step)
        assert_same(restored, state)
        _, params = opened().restore_params(abstract(state.params), step, fields=("ema", "params"))
        assert_same(params, state.ema if ema else state.params)


def test_a_checkpoint_holds_only_what_is_trained_itself(tmp_path, opened):
    state = saved_state(ema=False).replace(opt_state=())
    checkpoints = opened()
    write(checkpoints, 1, state)
    alone = json.loads((tmp_path / "checkpoints" / "1" / "arrays" / "_METADATA").read_bytes())[
        "tree_metadata"
    ]
    assert {tuple(key["key"] for key in entry["key_metadata"]) for entry in alone.values()} == {
        ("step",),
        ("params", "layers", "scale"),
    }


def test_a_run_that_is_resumed_keeps_the_folder_that_it_has_read(tmp_path, opened):
    state = saved_state()
    checkpoints = opened()
    write(checkpoints, 1, state)
    (base,) = bases(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in base.rglob("*")}
    resumed = opened()
    _, restored, _ = resumed.restore(abstract(state))
    write(resumed, 2, trained(restored))
    assert {path: path.stat().st_mtime_ns for path in base.rglob("*")} == before
    assert bases(tmp_path) == [base]


def test_a_folder_that_was_not_read_is_not_believed(tmp_path, opened):
    """Somebody removed the checkpoints and begins again; what lies beside them may be damaged."""
    state = saved_state()
    checkpoints = opened()
    write(checkpoints, 1, state)
    shutil.rmtree(tmp_path / "checkpoints" / "1")
    (base,) = bases(tmp_path)
    flip_a_bit(base)
    anew = opened()
    write(anew, 1, state)
    assert_same(opened().restore(abstract(state))[1], state)


def test_a_damaged_bit_or_a_missing_folder_is_one_line_that_names_it(tmp_path, opened):
    state = saved_state(ema=False)
    checkpoints = opened()
    write(checkpoints, 1, state)
    (base,) = bases(tmp_path)
    flip_a_bit(base)
    with pytest.raises(UserError, match="no checkpoint is intact, and none was changed") as caught:
        opened().restore(abstract(state))
    assert f"{base.name}: " in str(caught.value)
    assert any(name in str(caught.value) for name in RESTING)
    assert "\n" not in str(caught.value)
    shutil.rmtree(base)
    metadata = f"{base.name}/arrays/_METADATA"
    said = rf"{base.name}: arrays/_METADATA cannot be read \(FileNotFoundError.*{metadata}"
    with pytest.raises(UserError, match=said):
        opened().restore(abstract(state))


def test_a_place_outside_the_checkpoints_is_refused(tmp_path, opened):
    state = saved_state(ema=False)
    checkpoints = opened()
    write(checkpoints, 1, state)
    path = tmp_path / "checkpoints" / "1" / "manifest" / "manifest.json"
    content = json.loads(path.read_bytes())["content"]
    content["arrays"]["params/embed"]["place"] = "../../elsewhere"
    path.write_text(json.dumps({"sha256": files._sha256(content), "content": content}))
    with pytest.raises(
        UserError, match=r"'\.\./\.\./elsewhere', which is no folder of frozen parameters"
    ):
        opened().restore(abstract(state))


def test_folders_that_no_checkpoint_names_are_removed_and_others_stay(tmp_path, opened):
    """A run that trains other parameters from step 2 on: its old folder stays as long as a
    checkpoint needs it.
    """
    state = saved_state(ema=False)
    checkpoints = opened(keep=2)
    write(checkpoints, 1, state)
    (old,) = bases(tmp_path)
    other = opened(["embed"], keep=2)
    _, state, _ = other.restore(abstract(state))
    write(other, 2, state)
    assert len(bases(tmp_path)) == 2
    assert_same(opened().restore(abstract(state), 1)[1], state)
    write(other, 3, state)
    assert old not in bases(tmp_path)
    assert len(bases(tmp_path)) == 1
    assert_same(opened().restore(abstract(state))[1], state)


def test_a_checkpoint_that_holds_everything_is_resumed_and_written_with_a_folder(tmp_path, opened):
    state = saved_state()
    whole = opened(frozen=())
    write(whole, 1, state)
    assert files.read_manifest(tmp_path / "checkpoints" / "1")["format"] == 1
    assert not bases(tmp_path)
    resumed = opened()
    _, restored, _ = resumed.restore(abstract(state))
    write(resumed, 2, restored)
    assert files.read_manifest(tmp_path / "checkpoints" / "2")["format"] == 2
    for step in (1, 2):
        assert_same(opened().restore(abstract(state), step)[1], state)


def test_parts_of_frozen_parameters_are_read_where_they_lie(tmp_path, opened):
    state = saved_state(ema=False)
    checkpoints = opened()
    write(checkpoints, 1, state)
    shapes = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for name, leaf in named_leaves(state.params).items()
    }
    reader = ParamsReader(tmp_path, 1, shapes)
    for name, leaf in named_leaves(state.params).items():
        assert reader.read(name, ()).tobytes() == np.asarray(leaf).tobytes(), name
    reader.check()


def test_a_folder_of_another_name_is_somebody_else_s(tmp_path, opened):
    state = saved_state(ema=False)
    checkpoints = opened(keep=1)
    write(checkpoints, 1, state)
    (base,) = bases(tmp_path)
    copy, other = base.with_name(f"{base.name}.bak"), base.with_name("base-llama")
    shutil.copytree(base, copy)
    other.mkdir()
    write(checkpoints, 2, trained(state))
    assert bases(tmp_path) == sorted([base, copy, other])


@pytest.mark.parametrize(
    "content",
    ["[" * 200_000, "[]", "{", '{"content": {"arrays": {"params/embed": {"place": []}}}}'],
    ids=["deep", "a list", "half", "no place"],
)
def test_what_a_damaged_checkpoint_needs_is_not_guessed(tmp_path, opened, content):
    """Its folder stays, and the run goes on."""
    state = saved_state(ema=False)
    checkpoints = opened()
    write(checkpoints, 1, state)
    (base,) = bases(tmp_path)
    (tmp_path / "checkpoints" / "1" / "manifest" / "manifest.json").write_text(content)
    other = opened(["embed"])
    write(other, 2, state)
    assert len(bases(tmp_path)) == 2
    assert base in bases(tmp_path)


def test_a_checkpoint_that_was_set_aside_keeps_its_folder(tmp_path, opened):
    state = saved_state(ema=False)
    checkpoints = opened()
    write(checkpoints, 1, state)
    (base,) = bases(tmp_path)
    (tmp_path / "checkpoints" / "1").rename(tmp_path / "checkpoints" / "1.set-aside")
    other = opened(["embed"])
    write(other, 2, state)
    assert base in bases(tmp_path)
    assert len(bases(tmp_path)) == 2
    (tmp_path / "checkpoints" / "1.set-aside").rename(tmp_path / "elsewhere")  # the control
    write(other, 3, trained(state))
    assert base not in bases(tmp_path)


def test_a_folder_that_cannot_be_removed_ends_no_run(tmp_path, opened, monkeypatch, caplog):
    state = saved_state(ema=False)
    checkpoints = opened()
    write(checkpoints, 1, state)
    shutil.rmtree(tmp_path / "checkpoints" / "1")
    other = opened(["embed"])

    def refused(folder):
        if folder.exists():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

    monkeypatch.setattr(checkpoint_frozen, "remove_folder", refused)
    write(other, 2, state)
    assert other.steps() == [2]
    assert "is no longer needed, but cannot be removed: [Errno 13] Permission denied" in caplog.text


def test_a_folder_may_lie_behind_a_link(tmp_path, opened):
    """On another disk, say: the link goes when the folder is not needed, and what it points to
    stays.
    """
    state = saved_state(ema=False)
    checkpoints = opened()
    write(checkpoints, 1, state)
    (base,) = bases(tmp_path)
    base.rename(tmp_path / "far")
    base.symlink_to(tmp_path / "far")
    assert_same(opened().restore(abstract(state))[1], state)
    shutil.rmtree(tmp_path / "checkpoints" / "1")
    anew = opened()
    write(anew, 1, state)
    assert not base.is_symlink()
    assert (tmp_path / "far").is_dir()
    assert_same(opened().restore(abstract(state))[1], state)


def test_a_write_that_fails_leaves_nothing_half_written(tmp_path, opened, monkeypatch):
    state = saved_state(ema=False)
    checkpoints = opened()

    def full(self, state, checkpointer):
        (tmp_path / "checkpoints" / "base-0123456789abcdef.orbax-checkpoint-tmp").mkdir(
            parents=True
        )
        (tmp_path / "checkpoints" / "base-0123456789abcdef").mkdir()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint_frozen.FrozenParams, "save_frozen", full)
    with pytest.raises(
        UserError,
        match=r"No space left on device; it was not written\. There is no earlier checkpoint",
    ):
        checkpoints.save(1, state, {})
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("resumed", [False, True])
def test_a_folder_that_is_removed_in_the_middle_of_a_run_is_written_again(
    tmp_path, opened, resumed
):
    state = saved_state(ema=False)
    checkpoints = opened()
    write(checkpoints, 1, state)
    if resumed:
        checkpoints = opened()
        checkpoints.restore(abstract(state))
    (base,) = bases(tmp_path)
    shutil.rmtree(base)
    write(checkpoints, 2, trained(state))
    assert bases(tmp_path) == [base]
    assert_same(opened().restore(abstract(state))[1], trained(state))
