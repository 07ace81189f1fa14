"""Small arrays beside a checkpoint come back bit for bit, and a damaged one is noticed."""

import json

import numpy as np
import pytest

from research.training.checkpoint_files import Damaged, manifest_of, read_manifest
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
    "owed": False,
}


def test_arrays_and_plain_values_come_back_as_they_were():
    found = decode(json.loads(json.dumps(encode(EXTRA))))
    for name, array in EXTRA["loader"].items():
        np.testing.assert_array_equal(found["loader"][name], array, err_msg=name)
        assert found["loader"][name].dtype == array.dtype.newbyteorder("<"), name
    assert np.signbit(found["loader"]["weights"][1, 1])
    np.testing.assert_array_equal(found["list"][1]["a"], [0, 0])
    assert (found["list"][0], found["owed"]) == (1, False)
    found["loader"]["ids"][0] = 7  # and may be written to


def test_one_changed_byte_of_an_array_is_damage(tmp_path):
    manifest = manifest_of(3, {}, {}, EXTRA)
    step = tmp_path / "3"  # a checkpoint's folder has its step for a name
    folder = step / "manifest"
    folder.mkdir(parents=True)
    text = json.dumps(manifest)
    (folder / "manifest.json").write_text(text)
    np.testing.assert_array_equal(decode(read_manifest(step)["extra"])["list"][1]["a"], [0, 0])
    ids = manifest["content"]["extra"]["loader"]["ids"]["__array__"]["data"]
    (folder / "manifest.json").write_text(text.replace(ids, "B" + ids[1:]))
    with pytest.raises(Damaged):
        read_manifest(step)
