"""Digests see every flipped bit on any mesh: claims about `storage.digests`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from research.storage import digests as digests_module
from research.storage.digests import RunningDigest, digest_sums, digests

SHAPE = (3, 5)


def array(dtype: str) -> np.ndarray:
    raw = np.random.default_rng(0).integers(
        0, 256, size=(*SHAPE, jnp.dtype(dtype).itemsize), dtype=np.uint8
    )
    return raw.view(jnp.dtype(dtype))[..., 0] if dtype != "bool" else raw[..., 0] > 127


def reference(x: np.ndarray) -> str:
    """The two sums with Python's whole numbers, one element at a time."""
    mixes = (
        (0x9E3779B1, 0x7F4A7C15, (16, 0x85EBCA6B, 13, 0xC2B2AE35, 16)),
        (0xB5297A4D, 0x68E31DA4, (16, 0x7FEB352D, 15, 0x846CA68B, 16)),
    )
    words = x.reshape(-1).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize])
    text = ""
    for multiplier, offset, (s1, m1, s2, m2, s3) in mixes:
        total = 0
        for i, word in enumerate(words.tolist()):
            v = word ^ ((i * multiplier + offset) % 2**32)
            v = (v ^ (v >> s1)) * m1 % 2**32
            v = (v ^ (v >> s2)) * m2 % 2**32
            total += v ^ (v >> s3)
        text += f"{total % 2**32:08x}"
    return text


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "int32", "uint32", "uint8", "bool", "float8_e4m3fn"]
)
def test_digest_equals_a_plain_count(dtype):
    x = array(dtype)
    assert digests({"x": jnp.asarray(x)}) == {"x": reference(x)}


def test_digest_of_a_scalar_and_of_nothing():
    found = digests({"scalar": jnp.float32(-0.0), "empty": jnp.zeros((0, 3))})
    assert found == {"scalar": reference(np.float32([-0.0])), "empty": "0" * 16}


@pytest.mark.parametrize(
    ("sizes", "spec"), [((8, 1), ("a", None)), ((2, 4), ("a", "b")), ((2, 4), (None, ("a", "b")))]
)
def test_digest_does_not_depend_on_the_mesh(sizes, spec):
    x = np.random.default_rng(1).normal(size=(16, 24)).astype(np.float32)
    mesh = jax.make_mesh(sizes, ("a", "b"))
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    assert digests({"x": sharded}) == digests({"x": jnp.asarray(x)}) == {"x": reference(x)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_every_single_flipped_bit_changes_both_sums(dtype):
    x = array(dtype)
    bits = 8 * x.dtype.itemsize
    damaged = []
    for element in range(x.size):
        for bit in range(bits):
            y = x.copy().reshape(-1).view({8: np.uint8, 16: np.uint16, 32: np.uint32}[bits])
            y[element] ^= np.asarray(1 << bit, y.dtype)
            damaged.append(y.view(x.dtype).reshape(SHAPE))
    sums = np.asarray(jax.jit(jax.vmap(digest_sums))(np.stack([x, *damaged])))
    assert np.all(sums[1:] != sums[0])


def test_exchanged_elements_and_rows_change_the_digest():
    x = array("float32")
    found = [
        digests({"x": jnp.asarray(y)})["x"]
        for y in (x, x[::-1], x[:, ::-1], np.roll(x, 1), x.T.reshape(SHAPE))
    ]
    assert len(set(found)) == len(found)


PARTS = {
    "layers": [(slice(i, i + 1),) for i in range(6)],
    "columns of layers": [
        (slice(i, i + 1), slice(None), slice(j, j + 3)) for i in range(6) for j in (0, 3, 6)
    ],
    "planes": [(slice(None), slice(j, j + 1)) for j in range(5)],
    "blocks": [(slice(i, i + 2), slice(j, j + 3), slice(None)) for i in (0, 2, 4) for j in (0, 3)],
    "all of it": [()],
}


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
@pytest.mark.parametrize("block", [7, 2**18])
@pytest.mark.parametrize("compiled", [False, True])
def test_digest_of_parts_in_any_order_is_that_of_the_whole(
    parts, dtype, block, compiled, monkeypatch
):
    # The program and its cached offsets are of one size of block.
    monkeypatch.setattr("research.storage.digests._BLOCK", block)
    monkeypatch.setattr("research.storage.digests._NUMPY_BLOCK", block)
    digests_module._block_sums.clear_cache()
    digests_module._offsets_on_device.cache_clear()
    raw = np.random.default_rng(3).integers(
        0, 256, size=(6, 5, 8, jnp.dtype(dtype).itemsize), dtype=np.uint8
    )
    x = raw.view(jnp.dtype(dtype))[..., 0]
    running = RunningDigest(x.shape, compiled=compiled)
    for box in reversed(PARTS[parts]):
        starts = [each.indices(size)[0] for each, size in zip(box, x.shape, strict=False)]
        running.add(x[box], (*starts, *[0] * (x.ndim - len(starts))))
    assert running.text() == reference(x) == digests({"x": jnp.asarray(x)})["x"]
    digests_module._block_sums.clear_cache()
    digests_module._offsets_on_device.cache_clear()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_running_digest_starts_anywhere_beyond_32_bits_of_index(compiled):
    whole, part = (3, 2**31), np.arange(6, dtype=np.uint32).reshape(1, 6)
    one, other = RunningDigest(whole), RunningDigest(whole, compiled=compiled)
    one.add(part, (2, 5))  # the index 2³² + 5
    other.add(part, (0, 5))
    assert one._sums.tolist() == other._sums.tolist() != [0, 0]


def test_a_running_digest_that_lacks_a_part_is_refused():
    running = RunningDigest((4, 4))
    running.add(np.zeros((3, 4), np.float32), (0, 0))
    with pytest.raises(AssertionError, match="every element"):
        running.text()


def test_one_digest_is_under_way_at_a_time(monkeypatch):
    # Eight CPU devices stand still for ever with more than 32 programs under way.
    under_way = []
    digest_on_devices = digests_module._digest_on_devices

    def start(x):
        assert all(sums.is_ready() for sums in under_way)
        under_way.append(digest_on_devices(x))
        return under_way[-1]

    monkeypatch.setattr(digests_module, "_digest_on_devices", start)
    mesh = jax.make_mesh((8,), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    arrays = {
        str(index): jax.device_put(np.full((4096, 64), index, np.float32), sharding)
        for index in range(6)
    }
    assert len(set(digests(arrays).values())) == 6
    assert len(under_way) == 6
