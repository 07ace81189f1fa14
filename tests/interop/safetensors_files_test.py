"""A safetensors header is believed in nothing: claims about `interop.safetensors_files`."""

import json

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from research.core.errors import UserError
from research.interop.safetensors_files import Writer, read_header

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.weight": np.full((), 7, np.float32),
    "empty": np.zeros((0, 4), np.float32),
}


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_files_of_the_library_are_read(tmp_path):
    tensors = TENSORS | {
        "half": np.ones((3, 1), np.float16),
        "brain": np.full((2, 2), 1.5, jnp.bfloat16),
        "int": np.arange(5, dtype=np.int64),
        "bool": np.array([True, False]),
    }
    safetensors.numpy.save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    found = read_header(tmp_path / "x")
    assert found.keys() == tensors.keys()
    for name, stored in found.items():
        assert (stored.shape, stored.dtype) == (tensors[name].shape, tensors[name].dtype)
        np.testing.assert_array_equal(np.asarray(stored), tensors[name])
    starts = [stored.start for stored in found.values()]
    assert starts == sorted(starts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_in_rows_the_library_reads(dtype, tmp_path):
    tensors = {name: np.asarray(value.astype(dtype)) for name, value in TENSORS.items()}
    with Writer(
        tmp_path / "x", {name: value.shape for name, value in tensors.items()}, dtype
    ) as writer:
        writer.write("a", tensors["a"][:1])
        writer.write("a", tensors["a"][1:])
        writer.write("b.weight", tensors["b.weight"])
    found = safetensors.numpy.load_file(tmp_path / "x")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].dtype == value.dtype
    with safetensors.safe_open(tmp_path / "x", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_rows_out_of_turn_and_missing_rows_are_refused(tmp_path):
    shapes = {"a": (2,), "b": (2,)}
    with (
        pytest.raises(AssertionError, match="one after the other"),
        Writer(tmp_path / "x", shapes, "f4") as writer,
    ):
        writer.write("b", np.zeros(2, np.float32))
    with (
        pytest.raises(AssertionError, match="all tensors"),
        Writer(tmp_path / "x", shapes, "f4") as writer,
    ):
        writer.write("a", np.zeros(1, np.float32))


BAD = {
    "no file": (None, "No such file"),
    "nothing": (b"", "a header of 0 bytes is none for a file of 0"),
    "a short length": (b"\x02\x00", "is none for a file of 2"),
    "a header beyond the end": (
        (64).to_bytes(8, "little") + b"{}",
        "a header of 64 bytes is none for a file of 10",
    ),
    "a header of an exabyte": ((2**60).to_bytes(8, "little") + b"{}", "is none for a file"),
    "no JSON": (b"{{", "is not JSON"),
    "no text": (b"\xff\xfe{}", "is not JSON"),
    "deep JSON": (b"[" * 100_000, "is not JSON"),
    "a long number": (b'{"a":' + b"9" * 5000 + b"}", "is not JSON"),
    "a list": ([], "not a JSON object"),
    "a name twice": (b'{"a": {"dtype": "F32"}, "a": {}}', "names 'a' twice"),
    "a key twice": (b'{"a": {"shape": [1], "shape": [2]}}', "names 'shape' twice"),
    "a path": ({"../../etc/passwd": entry()}, "no tensor's name"),
    "a path in the middle": ({"a/b": entry()}, "no tensor's name"),
    "a path of another system": ({"a\\b": entry()}, "no tensor's name"),
    "lines in a name": ({"a\nb": entry()}, "no tensor's name"),
    "no name": ({"": entry()}, "'' … is no tensor's name: it has 0 letters"),
    "a name without end": ({"a" * 1000: entry()}, "it has 1,000 letters"),
    "no entry": ({"a": 3}, "not described"),
    "a field more": ({"a": {**entry(), "stride": 1}}, "not described"),
    "an unknown type": ({"a": entry("Q4")}, "unknown type 'Q4'"),
    "a type that is none": ({"a": entry(["F32"])}, "unknown type"),
    "a negative size": ({"a": entry(shape=(-1, -2))}, "has no shape"),
    "a size of another kind": ({"a": entry(shape=(2.0,))}, "has no shape"),
    "a truth for a size": ({"a": entry(shape=(True, 2))}, "has no shape"),
    "too many axes": ({"a": entry(shape=(1,) * 99)}, "has no shape"),
    "offsets backwards": ({"a": entry(offsets=(8, 0))}, "no data_offsets"),
    "three offsets": ({"a": entry(offsets=(0, 4, 8))}, "no data_offsets"),
    "bytes that do not fit the shape": ({"a": entry(shape=(3,))}, "has 8 bytes, but is"),
    "an enormous shape": ({"a": entry(shape=(2**62, 2**62))}, "has 8 bytes, but is"),
    "a gap": ({"a": entry(offsets=(4, 12))}, "starts at byte 4"),
    "an overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, "starts at byte 4"),
    "data that is cut short": (
        {"a": entry(shape=(4,), offsets=(0, 16))},
        "its tensors end at byte",
    ),
    "data that nobody owns": ({"a": entry(shape=(1,), offsets=(0, 4))}, "its tensors end at byte"),
}


@pytest.mark.parametrize("case", BAD)
def test_every_lie_is_named_in_one_line(case, tmp_path):
    header, message = BAD[case]
    path = tmp_path / "x.safetensors"
    raw = case in ("nothing", "a short length", "a header beyond the end", "a header of an exabyte")
    if raw:
        path.write_bytes(header)
    elif header is not None:
        write(path, header, data=bytes(8))
    with pytest.raises(UserError) as error:
        read_header(path)
    said = str(error.value)
    assert message in said
    assert said.startswith(f"{path} cannot be read: ")
    assert "\n" not in said


def test_the_honest_header_of_these_cases_is_read(tmp_path):
    found = read_header(
        write(tmp_path / "x", {"__metadata__": {"format": "pt"}, "a": entry()}, bytes(8))
    )
    np.testing.assert_array_equal(np.asarray(found["a"]), [0, 0])


def read_or_refuse(path):
    """The bytes of all tensors, or None where the file is refused in one line."""
    try:
        found = read_header(path)
    except UserError as error:
        said = str(error)
    else:
        return sum(np.asarray(stored).nbytes for stored in found.values())
    assert "\n" not in said
    return None


KEYS = st.sampled_from(["a", "b", "dtype", "shape", "data_offsets", "__metadata__"])
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["F32", "BF16"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
    header=JSON | st.dictionaries(st.text(max_size=3), st.just(entry())),
    data=st.binary(max_size=20),
)
def test_any_json_is_read_or_refused(header, data, tmp_path_factory):
    path = write(tmp_path_factory.getbasetemp() / "fuzz", header, data)
    assert read_or_refuse(path) in (None, len(data))


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(place=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.booleans())
def test_any_damaged_byte_leaves_a_file_that_is_refused_or_of_the_same_size(
    place, value, cut, tmp_path_factory
):
    path = tmp_path_factory.getbasetemp() / "damaged"
    whole = safetensors.numpy.save(TENSORS)
    place %= len(whole)
    path.write_bytes(whole[:place] if cut else whole[:place] + bytes([value]) + whole[place + 1 :])
    assert read_or_refuse(path) in (
        (None,) if cut else (None, sum(x.nbytes for x in TENSORS.values()))
    )
