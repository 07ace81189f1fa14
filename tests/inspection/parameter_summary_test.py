"""The summary of a model's parameters is that of the model itself."""

import dataclasses

import flax.linen as nn
import pytest

from research.core.trees import count, named_leaves
from research.inspection import parameter_summary
from research.models.config import ModelConfig
from research.models.flops import matmul_parameters
from research.recipes import describe
from tests.models.variants import VARIANTS
from tests.recipes import runs
from tests.tiny import abstract_params, tiny_config

MODELS = runs.ROOT / "configs" / "model"
PRESETS = (
    "llama.py:3.1-405b",
    "deepseek.py:v3-671b-mtp",
    "t5.py:base",
    "gemma.py:3-1b",
    "modernbert.py:base",
)


def printed_sum(lines: list[str]) -> int:
    """The sum of the tree's outermost counts, as they are printed."""
    return sum(int(line.split()[-1].replace(",", "")) for line in lines if line[0] in "├└")


def printed_module_sums(node: parameter_summary.ParameterNode) -> bool:
    """Whether each module has as many parameters as its children."""
    own = node.count_each == sum(child.count for child in node.children) if node.children else True
    return own and all(map(printed_module_sums, node.children))


@pytest.mark.fast_cases(
    "windows", "sinks", "shared experts", "latent", "encoder-decoder", "encoder"
)
@pytest.mark.parametrize("name", VARIANTS)
def test_tree_holds_every_parameter_of_the_model(name: str):
    config = VARIANTS[name]
    model, params = parameter_summary.parameter_tree(config), nn.unbox(abstract_params(config))
    assert model.count == count(params)
    assert printed_sum(parameter_summary.tree_lines(model)) == model.count
    assert printed_module_sums(model)
    # Not only as many: each shape as often as the model has it.
    found: dict[tuple[int, ...], int] = {}
    for _, leaf, repeats in model.leaves():
        found[leaf.shape] = found.get(leaf.shape, 0) + repeats
    shapes = [leaf.shape for leaf in named_leaves(params).values()]
    assert found == {shape: shapes.count(shape) for shape in set(shapes)}


def test_tree_tells_a_missing_parameter():  # the control
    config = VARIANTS["sinks"]
    without = dataclasses.replace(
        config, attention=dataclasses.replace(config.attention, sinks=False)
    )
    assert parameter_summary.parameter_tree(without).count != count(
        nn.unbox(abstract_params(config))
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_tree_of_a_preset_holds_every_parameter(preset: str):
    config = describe.load_model(str(MODELS / preset), [])
    scanned = dataclasses.replace(config, layer_loop="scan")
    assert parameter_summary.parameter_tree(config).count == count(
        nn.unbox(abstract_params(scanned))
    )


def matrices(config: ModelConfig) -> int:
    """Weights of the tree that a token is multiplied with, of experts those that it goes to, and
    the head's.
    """
    total = config.embed_dim * config.vocab_size
    for path, leaf, repeats in parameter_summary.parameter_tree(config).leaves():
        if leaf.name == "kernel" and "pooler" not in path:
            idle = config.experts is not None and "expert" in leaf.axes
            share = config.experts.experts_per_token / config.experts.num_experts if idle else 1
            total += round(leaf.count_each * repeats * share)
    return total


@pytest.mark.parametrize(
    "name", ["soft caps", "shared experts", "latent", "latent, direct queries", "encoder"]
)
def test_matrices_of_the_tree_are_those_that_flops_are_counted_of(name: str):
    assert matrices(VARIANTS[name]) == matmul_parameters(VARIANTS[name])


def test_active_parameters_leave_out_the_experts_that_a_token_does_not_meet():
    config = VARIANTS["shared experts"]
    model, experts = parameter_summary.parameter_tree(config), config.experts
    one_expert = 3 * config.embed_dim * experts.hidden_dim
    idle = 2 * (experts.num_experts - experts.experts_per_token) * one_expert
    assert parameter_summary.active_parameters(config, model) == model.count - idle


def test_cache_numbers_count_keys_and_values_of_all_layers():
    assert parameter_summary.cache_numbers(tiny_config()) == (2 * 2 * 2 * 4, 0)
    assert parameter_summary.cache_numbers(VARIANTS["latent"]) == (2 * (6 + 4), 0)
    assert parameter_summary.cache_numbers(VARIANTS["encoder-decoder"]) == (
        2 * 2 * 2 * 4,
        2 * 2 * 2 * 4,
    )


def test_layers_are_named_by_runs():
    assert parameter_summary.layers_name([0]) == "layer 0"
    assert parameter_summary.layers_name([0, 1, 2, 5]) == "layers 0–2, 5"
    assert parameter_summary.layers_name(list(range(0, 26, 2))) == "layers 0, 2, …, 24"


def test_json_has_the_same_tree():
    model = parameter_summary.parameter_tree(VARIANTS["shared experts"])
    node = model.to_json()

    def total(node):
        if "children" not in node:
            return node["count"]
        return node.get("num_layers", 1) * sum(map(total, node["children"]))

    assert node["count"] == model.count == total(node)
    (embed,) = node["children"][0]["children"]
    assert embed == {
        "name": "embedding",
        "count": 48 * 16,
        "shape": [48, 16],
        "axes": ["vocab", "embed"],
    }
