"""Small arrays beside a checkpoint come back bit for bit, and a damaged one is noticed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import UserError
from research.training.checkpoint_files import Damaged, build_manifest, read_manifest
from research.training.manifest_values import decode, encode

EXTRA = {
    "loader": {
        "weights": np.array([[0.1, np.nan], [np.inf, -0.0]]),
        "ids": np.arange(3, dtype=">i8"),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 4), np.int32),
        "bits": np.array([True, False]),
    },
    "list": [1, {"a": np.zeros(2, np.uint16)}],
    "flag": False,
}


def test_arrays_and_plain_values_come_back_as_they_were():
    found = decode(json.loads(json.dumps(encode(EXTRA))))
    for name, array in EXTRA["loader"].items():
        np.testing.assert_array_equal(found["loader"][name], array, err_msg=name)
        assert found["loader"][name].dtype == array.dtype.newbyteorder("<"), name
    assert np.signbit(found["loader"]["weights"][1, 1])
    np.testing.assert_array_equal(found["list"][1]["a"], [0, 0])
    assert (found["list"][0], found["flag"]) == (1, False)
    found["loader"]["ids"][0] = 7  # and may be written to


def _back(value):
    return decode(json.loads(json.dumps(encode(value))))


@pytest.mark.parametrize(
    "name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "complex64", "datetime64[ns]"]
)
def test_types_that_numpy_lacks_come_back_too(name):
    array = np.arange(3).astype(np.dtype(name))
    found = _back({"a": array})["a"]
    assert found.dtype == array.dtype
    assert found.tobytes() == array.tobytes()


def test_scalars_and_arrays_of_jax_come_back_as_arrays():
    found = _back(
        [np.float32(2.5), jnp.arange(3, dtype=jnp.int8), jnp.bfloat16(0.5), np.bool_(True)]
    )
    assert [array.dtype.name for array in found] == ["float32", "int8", "bfloat16", "bool"]
    assert [array.tolist() for array in found] == [2.5, [0, 1, 2], 0.5, True]


def test_arrays_of_older_checkpoints_are_read():
    found = decode({"__array__": {"dtype": "<f4", "shape": [1], "data": "AACAPw=="}})
    np.testing.assert_array_equal(found, np.ones(1, np.float32), strict=True)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array([None]), "is an array of object, which a checkpoint cannot keep"),
        (
            np.zeros(2, "i4,f4"),
            "is an array of [('f0', '<i4'), ('f1', '<f4')], which a checkpoint cannot keep",
        ),
        ({1, 2}, "is a set, which JSON has not"),
    ],
)
def test_what_would_not_come_back_is_one_line(value, message):
    with pytest.raises(UserError) as error:
        encode({"loader": [0, value]})
    assert str(error.value).startswith(f"extra.loader.1 {message}")
    assert "\n" not in str(error.value)


def test_random_keys_are_no_array_beside_a_checkpoint():
    with pytest.raises(
        UserError, match=r"^extra\.key is an array of random keys\. Use jax\.random\.key_data"
    ):
        encode({"key": jax.random.key(0)})


def test_one_changed_byte_of_an_array_is_damage(tmp_path):
    manifest = build_manifest(3, {}, EXTRA)
    folder = tmp_path / "3" / "manifest"
    folder.mkdir(parents=True)
    text = json.dumps(manifest)
    (folder / "manifest.json").write_text(text)
    np.testing.assert_array_equal(
        decode(read_manifest(tmp_path / "3")["extra"])["list"][1]["a"], [0, 0]
    )
    ids = manifest["content"]["extra"]["loader"]["ids"]["__array__"]["data"]
    (folder / "manifest.json").write_text(text.replace(ids, "B" + ids[1:]))
    with pytest.raises(Damaged, match="its sha256 differs"):
        read_manifest(tmp_path / "3")
