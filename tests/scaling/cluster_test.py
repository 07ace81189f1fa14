"""Names of clusters are read without any of their devices."""

import pytest
from jax.experimental import topologies

from research.core.errors import UserError
from research.scaling.cluster import parse_cluster


@pytest.mark.parametrize(
    ("name", "platform", "per_slice", "slices", "memory"),
    [
        ("v4:4x4x8", "tpu", 128, 1, 32 * 2**30),
        ("v5p:4x4x4", "tpu", 64, 1, 95 * 2**30),
        ("v5p:4x4x4*2", "tpu", 64, 2, 95 * 2**30),
        ("v5e:4x4", "tpu", 16, 1, 16 * 2**30),
        ("v6e:16x16", "tpu", 256, 1, 32 * 2**30),
        ("tpu7x:4x4x4", "tpu", 128, 1, 96 * 2**30),
        ("h200:4", "gpu", 4, 1, 141 * 10**9),
        ("h200:16", "gpu", 8, 2, 141 * 10**9),
        ("h100:64", "gpu", 8, 8, 80 * 10**9),
        ("h100:8*3", "gpu", 8, 3, 80 * 10**9),
        ("cpu:8", "cpu", 8, 1, None),
        ("cpu:4*2", "cpu", 4, 2, None),
    ],
)
def test_a_name_says_how_many_devices_in_how_many_slices(name, platform, per_slice, slices, memory):
    cluster = parse_cluster(name)
    assert (cluster.platform, cluster.devices_per_slice) == (platform, per_slice)
    assert (cluster.slices, cluster.memory_bytes) == (slices, memory)
    assert cluster.num_devices == per_slice * slices


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "devices = '' names no devices. Use a form such as v5p:4x4x4"),
        ("v5p", "names no devices"),
        ("v5p-128", "names no devices"),
        ("v5p:4x4x4x", "names no devices"),
        ("v5q:4x4x4", "'v5q' is no kind of device. Did you mean 'v5p'?"),
        ("v5p:4x4", "must have 3 sizes, such as 4x4x4"),
        ("v6e:4x4x4", "must have 2 sizes, such as 4x4:"),
        ("v5p:3x4x4", "a host has 2x2x1 chips"),
        ("v5p:4x0x4", "has a size of 0"),
        ("cpu:8*0", "has a size of 0"),
        ("h200:12", "does not fill its nodes of 8 GPUs"),
        ("h200:4x4", "has a shape, which only TPUs have"),
    ],
)
def test_a_name_of_no_cluster_gets_one_line(name, message):
    with pytest.raises(UserError) as raised:
        parse_cluster(name)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.compilers
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("v4:2x2x2", {"chip_config_name": "megacore"}),
        ("v5p:4x4x4", {}),
        ("v5p:2x2x2*2", {}),
        ("v5e:4x4", {}),
        ("v6e:4x8", {}),
        ("tpu7x:2x2x2", {}),
    ],
)
def test_the_compiler_has_as_many_devices_of_the_same_kind_in_as_many_slices(
    name, options, monkeypatch
):
    pytest.importorskip("libtpu", reason="needs the extra `tpu`")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    cluster = parse_cluster(name)
    if cluster.slices > 1:
        options = {**options, "num_slices": cluster.slices}
    topology_name = name.partition("*")[0]
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=topology_name, **options
    ).devices
    assert len(devices) == cluster.num_devices
    assert {device.device_kind for device in devices} == {cluster.device_kind}
    assert len({getattr(device, "slice_index", 0) for device in devices}) == cluster.slices


@pytest.mark.compilers
@pytest.mark.parametrize("name", ["v5p:3x4x4", "v4:5x4x4"])
def test_the_compiler_does_not_know_a_torus_that_hosts_do_not_fill(name, monkeypatch):
    pytest.importorskip("libtpu", reason="needs the extra `tpu`")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    with pytest.raises(Exception, match="not divisible"):
        topologies.get_topology_desc(platform="tpu", topology_name=name)
