"""What the compiler says of a run: memory, collectives, accidents."""

import dataclasses

import pytest

from research.core.errors import UserError
from research.data.objectives import CAUSAL
from research.inspection import compile_report as module
from research.inspection.compile_lines import compile_report_lines
from research.inspection.compile_report import (
    CompileReport,
    compile_report,
    compile_report_json,
)
from research.inspection.expected_collectives import expected_collectives
from research.models.config import ModelConfig
from research.optim.optimizers import OptimConfig
from research.parallel.mesh_config import MeshConfig
from research.scaling.cluster import parse_cluster
from research.scaling.compiled_step import DeviceMemory
from research.training.config import TrainConfig
from tests.tiny import tiny_config

SIZES = {"data": 2, "fsdp": 2, "pipeline": 1, "context": 1, "expert": 1, "tensor": 2}


def report_of(model: ModelConfig, mesh: MeshConfig, devices: str, **train) -> CompileReport:
    options = TrainConfig(steps=2, **({"batch_size": 8, "sequence_length": 16} | train))
    cluster = parse_cluster(devices)
    return compile_report(model, options, OptimConfig(), mesh, CAUSAL, cluster)


@pytest.fixture(scope="module")
def report() -> CompileReport:
    return report_of(tiny_config(), MeshConfig(fsdp=2, tensor=2), "cpu:8")


def test_memory_is_that_of_the_state_and_more(report: CompileReport):
    memory = report.memory
    assert memory.arguments > 0
    assert memory.total > memory.arguments + memory.temporaries
    assert memory.margin is None
    bounded = dataclasses.replace(memory, limit=2 * memory.total)
    assert bounded.margin == 0.5


def test_a_margin_is_below_zero_where_a_program_does_not_fit():
    memory = DeviceMemory(arguments=90, temporaries=30, results=0, code=0, limit=100)
    assert memory.margin == pytest.approx(-0.2)


def test_every_axis_sends_what_it_is_for(report: CompileReport):
    assert report.mesh == {"data": 2, "fsdp": 2, "tensor": 2}
    kinds = {(group.kind, group.axes) for group in report.traffic}
    assert ("all-gather", ("fsdp",)) in kinds
    assert ("all-reduce", ("tensor",)) in kinds
    assert ("all-reduce", ("data",)) in kinds
    # Those that send most come first.
    sent = [group.sent_bytes for group in report.traffic]
    assert sent == sorted(sent, reverse=True)
    assert all(group.network == "memory" for group in report.traffic)
    # A CPU computes nothing meanwhile.
    assert report.exposed == 1


def test_the_cost_of_compiling_is_counted(report: CompileReport):
    assert report.cost.compile_seconds > 0
    assert report.cost.cpu_seconds > 0
    assert report.cost.host_bytes > 2**20


def test_lines_and_json_have_the_same_content(report: CompileReport):
    lines = compile_report_lines(report)
    assert lines[0] == "8 devices, cpu:8: data 2 × fsdp 2 × tensor 2"
    text = "\n".join(lines)
    assert f"{report.memory.total:,}" in text
    assert "no accidents" in text
    found = compile_report_json(report)
    assert found["memory"]["total"] == report.memory.total
    assert len(found["traffic"]) == len(report.traffic)
    for group in found["traffic"]:
        assert any(group["kind"] in line and "memory" in line for line in lines)


def test_one_device_sends_nothing():
    alone = report_of(tiny_config(), MeshConfig(), "cpu:1")
    assert alone.mesh == {}
    assert "no collectives" in compile_report_lines(alone)


def test_sizes_that_do_not_fit_are_one_line():
    with pytest.raises(UserError, match=r"mesh.fsdp = 3 does not fit 8 devices"):
        report_of(tiny_config(), MeshConfig(fsdp=3), "cpu:8")
    with pytest.raises(UserError, match=r"devices = 'cpu:64' are more than the 8"):
        report_of(tiny_config(), MeshConfig(), "cpu:64")


def test_sums_over_the_axes_of_the_width_are_expected_at_level_1_alone():
    assert ("all-reduce", ("fsdp",)) not in expected_collectives(SIZES, zero=3)
    assert ("all-reduce", ("fsdp",)) in expected_collectives(SIZES, zero=1)
    for zero in (1, 2, 3):
        found = expected_collectives(SIZES, zero)
        assert ("all-reduce", ("data",)) in found
        assert ("all-reduce", ("tensor",)) in found
        assert ("all-gather", ("fsdp",)) in found
        # An axis of one device has none.
        assert not any("expert" in axes for _, axes in found)


@pytest.mark.compilers
def test_what_the_compiler_for_a_tpu_refuses_is_one_line():
    pytest.importorskip("libtpu", reason="needs the extra `tpu`")
    with pytest.raises(UserError, match=r"compiler_options: No such compile option: 'xla_fast'"):
        report_of(tiny_config(), MeshConfig(compiler_options=("xla_fast=true",)), "v5e:2x2")
    wide = tiny_config(embed_dim=8192, vocab_size=2**19, dtype="bfloat16")
    with pytest.raises(UserError, match=r"'v5e:2x2' is too small: a device needs .*G of its .*G"):
        report_of(wide, MeshConfig(), "v5e:2x2")


@pytest.mark.compilers
def test_a_collective_that_no_axis_explains_is_an_accident(monkeypatch):
    pytest.importorskip("libtpu", reason="needs the extra `tpu`")
    mesh = MeshConfig(fsdp=4, data=1)
    # Each device has 128 columns of a table of 32 MB: narrower ones would be padded, and smaller
    # gradients summed together.
    wide = tiny_config(vocab_size=2**14, embed_dim=512)
    assert report_of(wide, mesh, "v5e:2x2").accidents == ()
    # The control: nothing is expected.
    monkeypatch.setattr(module, "expected_collectives", lambda sizes, zero: frozenset())
    assert report_of(wide, mesh, "v5e:2x2").accidents
