"""No damage passes for a checkpoint: claims about `training.checkpoint_files`."""

import json
import logging
import pathlib
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from etils import epath

from research.core.errors import UserError
from research.training.checkpoint_arrays import array_kvstore
from research.training.checkpoints import CheckpointConfig, Checkpoints
from tests.training.states import abstract, assert_same, new_state

# No read that fails may leave anything behind that prints a traceback.
pytestmark = pytest.mark.filterwarnings(
    "error::pytest.PytestUnraisableExceptionWarning", "error::RuntimeWarning"
)

EXTRA = {"loader": {"position": 12345}, "losses": [0.1, 1e-300]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with one checkpoint, and the state in it."""
    workdir = tmp_path_factory.mktemp("saved")
    state = new_state()
    checkpoints = Checkpoints(workdir, CheckpointConfig())
    checkpoints.save(10, state, EXTRA)
    checkpoints.close()
    return workdir, state


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "run")
    return tmp_path / "run", saved[1]


def outcome(workdir: pathlib.Path, state) -> str:
    """What restoring says: the error's text, or "" when every bit of state and extra is as it was
    saved.
    """
    try:
        step, restored, extra = Checkpoints(workdir, CheckpointConfig()).restore(abstract(state))
    except UserError as error:
        return str(error)
    assert (step, extra) == (10, EXTRA)
    assert_same(restored, state)
    return ""


def files_of(workdir: pathlib.Path, pattern: str = "*") -> list[pathlib.Path]:
    return sorted(
        path for path in (workdir / "checkpoints" / "10").rglob(pattern) if path.is_file()
    )


def size(path: pathlib.Path) -> int:
    return path.stat().st_size


def flip(path: pathlib.Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def place_of(workdir: pathlib.Path, array) -> tuple[pathlib.Path, int]:
    """The file and the byte at which an array's raw bytes lie."""
    raw = np.asarray(array).tobytes()
    [found] = [
        (path, path.read_bytes().index(raw))
        for path in files_of(workdir)
        if raw in path.read_bytes()
    ]
    return found


def test_the_untouched_checkpoint_is_whole(copy):
    assert outcome(*copy) == ""


def test_every_flipped_bit_is_caught_or_harmless(saved):
    workdir, state = saved
    rng = random.Random(0)
    caught = 0
    files = files_of(workdir)
    data = [path for path in files if path.parent.name == "d"]
    # Files that hold more are hit more often: their number, order and names differ from one writing
    # to the next.
    chosen = [
        path
        for among, count in ((data, 90), (files, 30))
        for path in rng.choices(among, [size(path) for path in among], k=count)
    ]
    for path in chosen:
        whole = path.read_bytes()
        flip(path, rng.randrange(8 * len(whole)))
        caught += outcome(workdir, state) != ""
        path.write_bytes(whole)
    assert caught >= 80
    assert outcome(workdir, state) == ""


def stacked_kernels(tree):
    return jnp.stack([tree[f"layers_{i}"]["mlp"]["kernel"] for i in range(3)])


def test_each_of_forty_flipped_bits_names_its_array(saved):
    workdir, state = saved
    rng = random.Random(1)
    arrays = {
        "params/layers/mlp/kernel": stacked_kernels(state.params),
        "opt_state/0/mu/layers/mlp/kernel": stacked_kernels(state.opt_state[0].mu),
        "opt_state/0/nu/layers/mlp/kernel": stacked_kernels(state.opt_state[0].nu),
        "params/embed": state.params["embed"],
    }
    for i in range(40):
        name = list(arrays)[i % len(arrays)]
        path, start = place_of(workdir, arrays[name])
        bit = 8 * start + rng.randrange(8 * arrays[name].nbytes)
        flip(path, bit)
        assert f"checkpoints/10: the bits of array {name} are not those that were saved" in outcome(
            workdir, state
        )
        flip(path, bit)
    assert outcome(workdir, state) == ""


def test_orbax_alone_returns_a_flipped_bit_without_a_word(copy):
    workdir, state = copy
    kernel = stacked_kernels(state.params)
    path, start = place_of(workdir, kernel)
    flip(path, 8 * start + 77)
    folder = epath.Path(workdir / "checkpoints" / "10" / "arrays")
    restored = ocp.PyTreeCheckpointer().restore(folder)
    assert not np.array_equal(restored["params"]["layers"]["mlp"]["kernel"], kernel)


def test_missing_short_and_empty_files_are_caught_or_harmless(saved):
    workdir, state = saved
    caught = {}
    for path in files_of(workdir):
        whole = path.read_bytes()
        for harm in ("missing", "short", "empty"):
            if harm == "missing":
                path.unlink()
            else:
                path.write_bytes(whole[: len(whole) // 2] if harm == "short" else b"")
            caught[path.relative_to(workdir / "checkpoints" / "10").as_posix(), harm] = outcome(
                workdir, state
            )
            path.write_bytes(whole)
    assert "manifest.json is missing" in caught["manifest/manifest.json", "missing"]
    assert "manifest.json cannot be read" in caught["manifest/manifest.json", "short"]
    data = {key: said for key, said in caught.items() if "/d/" in key[0]}
    assert data
    assert any("array " in said for said in data.values())
    assert caught["arrays/manifest.ocdbt", "missing"]
    assert outcome(workdir, state) == ""


def test_a_changed_number_in_the_manifest_is_caught(copy):
    workdir, state = copy
    [path] = files_of(workdir, "manifest.json")
    manifest = json.loads(path.read_text())
    manifest["content"]["extra"]["loader"]["position"] += 1
    path.write_text(json.dumps(manifest))
    assert "manifest.json is not what was written" in outcome(workdir, state)


def test_exchanged_arrays_are_caught(copy):
    """Two arrays of one shape, exchanged: every bit is there, at another name."""
    workdir, state = copy
    mu, nu = stacked_kernels(state.opt_state[0].mu), stacked_kernels(state.opt_state[0].nu)
    (path, start), (other, second) = place_of(workdir, mu), place_of(workdir, nu)
    for target, at, array in ((path, start, nu), (other, second, mu)):
        data = bytearray(target.read_bytes())
        data[at : at + mu.nbytes] = np.asarray(array).tobytes()
        target.write_bytes(data)
    assert "opt_state/0/mu/layers/mlp/kernel and 1 more" in outcome(workdir, state)


def test_the_newest_good_checkpoint_is_used_and_the_damaged_one_named(copy, caplog):
    workdir, state = copy
    checkpoints = Checkpoints(workdir, CheckpointConfig(every=10))
    later = jax.tree.map(lambda x: x + 1, state)
    checkpoints.save(20, later, {})
    checkpoints.close()
    (workdir / "checkpoints" / "20" / "manifest" / "manifest.json").write_text("{")
    with caplog.at_level(logging.WARNING, "tessera"):
        assert outcome(workdir, state) == ""
    assert "checkpoints/20: manifest.json cannot be read" in caplog.text


def test_all_damaged_is_an_error_that_names_all(copy):
    workdir, state = copy
    shutil.copytree(workdir / "checkpoints" / "10", workdir / "checkpoints" / "20")
    for path in (workdir / "checkpoints").rglob("manifest.json"):
        path.unlink()
    said = outcome(workdir, state)
    assert "checkpoints/10: manifest.json is missing" in said
    assert "checkpoints/20: manifest.json is missing" in said
    assert "\n" not in said


def wider(tree):
    return jax.tree.map(
        lambda x: x if x.ndim == 0 else jnp.concatenate([x, x[..., :1]], axis=-1), tree
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (wider, "params/embed is bfloat16[96, 8] in it; the config wants bfloat16[96, 9]"),
        (
            lambda s: s.replace(ema=s.params),
            "ema/embed is not in it; the config wants bfloat16[96, 8]",
        ),
        (
            lambda s: s.replace(params={k: v for k, v in s.params.items() if k != "embed"}),
            "params/embed is bfloat16[96, 8] in it; the config wants no such array",
        ),
        (
            lambda s: s.replace(params={k: v for k, v in s.params.items() if k != "layers_2"}),
            "params/layers/mlp/bias is bfloat16[3, 32] in it; the config wants bfloat16[2, 32]",
        ),
        (
            lambda s: s.replace(step=jnp.float32(0)),
            "step is int32[] in it; the config wants float32[]",
        ),
    ],
)
def test_another_architecture_is_an_error_that_names_the_first_difference(copy, change, said):
    workdir, state = copy
    found = outcome(workdir, change(state))
    assert f"checkpoints/10 is of another architecture: {said}." in found
    assert "\n" not in found


def grouped_otherwise(state):
    """As where the optimizer takes one parameter into another of its groups."""
    mu = dict(state.opt_state[0].mu)
    del mu["embed"]
    return state.replace(opt_state=(state.opt_state[0]._replace(mu=mu), *state.opt_state[1:]))


def test_an_optimizer_state_that_is_grouped_otherwise_is_not_called_another_architecture(copy):
    workdir, state = copy
    found = outcome(workdir, grouped_otherwise(state))
    assert (
        "checkpoints/10 has this model's parameters, but its optimizer's state is grouped otherwise"
        in found
    )
    assert (
        "so train cannot resume it: opt_state/0/mu/embed is bfloat16[96, 8] in it; the config "
        "wants no such" in found
    )
    assert "another architecture" not in found
    assert "\n" not in found


def test_a_later_format_is_an_error(copy, monkeypatch):
    workdir, state = copy
    monkeypatch.setattr("research.training.checkpoint_files.FORMATS", (2, 3))
    assert "format = 1 is unknown to this version, which reads up to 3" in outcome(workdir, state)


def test_an_array_of_another_type_on_disk_is_caught(copy):
    """Its bits are the same, so the digest alone would not tell."""
    workdir, state = copy
    folder = workdir / "checkpoints" / "10" / "arrays"
    spec = {"driver": "zarr", "kvstore": array_kvstore(folder, "params/layers/scale")}
    values = ts.open(spec, open=True).result().read().result()
    assert values.dtype == np.float32
    other = {
        "metadata": {"shape": [3, 8], "chunks": [3, 8], "dtype": "<i4"},
        "delete_existing": True,
        "create": True,
    }
    ts.open({**spec, **other}).result().write(values.view(np.int32)).result()
    assert "params/layers/scale cannot be read (it is stored as int32[3, 8])" in outcome(
        workdir, state
    )


def test_every_flipped_bit_of_the_small_files_is_caught_or_harmless(saved):
    """All of them but the arrays' bits: whatever parses them, no error of another type, and no
    other bits.
    """
    workdir, state = saved
    rng, caught, count = random.Random(2), 0, 0
    small = [path for path in files_of(workdir) if path.parent.name != "d"]
    assert {"_METADATA", "manifest.json", "manifest.ocdbt"} <= {path.name for path in small}
    for path in small:
        whole = path.read_bytes()
        for bit in rng.sample(range(8 * len(whole)), min(50, 8 * len(whole))):
            flip(path, bit)
            caught += outcome(workdir, state) != ""
            count += 1
            path.write_bytes(whole)
    assert caught > count / 10
    assert outcome(workdir, state) == ""


def test_a_flipped_bit_in_the_name_of_an_array_is_damage_and_the_checkpoint_before_is_used(
    copy, caplog
):
    workdir, state = copy
    checkpoints = Checkpoints(workdir, CheckpointConfig(every=10))
    checkpoints.save(20, state, {})
    checkpoints.close()
    path = workdir / "checkpoints" / "20" / "arrays" / "_METADATA"
    flip(path, 8 * path.read_bytes().index(b'"kernel"') + 8)
    assert outcome(workdir, state) == ""  # that of step 10
    assert "checkpoints/20: arrays/_METADATA is not what was written" in caplog.text
