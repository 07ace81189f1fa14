"""Presets of `configs/pods` bind, name devices that exist, and fit them before activations."""

import pathlib

import pytest

from research.core import config as configs
from research.core.errors import UserError
from research.core.trees import count
from research.inspection.mesh_report import mesh_report
from research.parallel.mesh_config import MeshConfig
from research.recipes.experiment import ExperimentConfig, load_experiment
from research.recipes.pods import pod_specs
from research.scaling.cluster import Cluster, parse_cluster
from research.scaling.topology import cluster_devices
from tests.tiny import abstract_params

FOLDER = pathlib.Path(__file__).parents[2] / "configs" / "pods"
SPECS = pod_specs(str(FOLDER))
NAMED = (
    "llama2.py:7b",
    "llama2.py:70b",
    "llama3.py:8b",
    "llama3.py:70b",
    "llama3.py:405b",
    "gpt3.py:175b",
    "chinchilla.py:70b",
    "mixtures.py:mixtral-8x7b",
    "mixtures.py:deepseek-v3-671b",
    "mixtures.py:1t",
)


def run_of(spec: str) -> tuple[ExperimentConfig, Cluster]:
    run = load_experiment(spec, [])
    return run, parse_cluster(run.mesh.devices)


def test_the_named_models_and_devices_have_presets():
    names = [pathlib.Path(spec).name for spec in SPECS]
    for name in NAMED:
        assert any(each.startswith(name) for each in names), name
    kinds = {run_of(spec)[1].name.partition(":")[0] for spec in SPECS}
    assert kinds >= {"v4", "v5p", "v6e", "tpu7x", "h100", "h200"}


@pytest.mark.fast_cases("llama2.py:7b-v4-128")
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: pathlib.Path(spec).name)
def test_a_preset_leaves_half_of_the_memory_to_activations(spec: str):
    run, cluster = run_of(spec)
    report = mesh_report(run.model, run.train, run.optim, run.mesh, run.data.objective, cluster)
    assert report.device.total < cluster.memory_bytes / 2


@pytest.mark.thorough
def test_a_trillion_parameters_are_that_many():
    run, cluster = run_of(f"{FOLDER}/mixtures.py:1t-v5p-4096")
    parameters = count(abstract_params(run.model))
    assert parameters == pytest.approx(1.03e12, rel=0.01)
    # In float32, and the experts, which are nearly all, are sharded over all devices.
    report = mesh_report(run.model, run.train, run.optim, run.mesh, run.data.objective, cluster)
    others = parameters * 0.02
    assert report.device.parameters / 4 < parameters / cluster.num_devices + others / 32


@pytest.mark.thorough
def test_projections_from_latents_are_sharded_too():
    run, cluster = run_of(f"{FOLDER}/mixtures.py:deepseek-v3-671b-v5p-2048")
    report = mesh_report(run.model, run.train, run.optim, run.mesh, run.data.objective, cluster)
    arrays = {array.name: array for group in report.parameters for array in group.arrays}
    key = arrays["attention/key/kernel"]
    assert key.axes[1:] == ("latent", "heads", "head")
    assert key.mesh_axes[1] == ("fsdp",)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: pathlib.Path(spec).name)
def test_the_compiler_knows_the_devices_of_a_preset(spec: str):
    _, cluster = run_of(spec)
    needed = "libtpu" if cluster.platform == "tpu" else "jax_cuda12_plugin"
    pytest.importorskip(needed, reason="compiles for them")
    assert len(cluster_devices(cluster)) == cluster.num_devices


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_an_unknown_preset_is_one_line(file: pathlib.Path):
    if configs.preset_names(str(file)):
        with pytest.raises(UserError, match=r"preset = 'tiny' is not here\."):
            configs.load_file(f"{file}:tiny")


def test_a_compiler_option_has_a_value():
    with pytest.raises(UserError, match=r"compiler_options = 'xla_fast' must be name=value\."):
        MeshConfig(compiler_options=("xla_fast",))
