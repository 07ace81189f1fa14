"""A workdir is served in the type that was asked for; `--debug_nans` names what is bad in it."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import research
from research import cli
from research.core.errors import UserError
from research.core.trees import named_leaves
from research.training.checkpoint_stream import write_params
from tests.recipes.fixtures import Unbroken


@pytest.mark.parametrize("mesh", [None, {"tensor": 2, "fsdp": 2}])
def test_a_model_in_bfloat16_has_the_averages_rounded_once(unbroken: Unbroken, mesh):
    model = research.load(unbroken.workdir, mesh=mesh, dtype="bfloat16")
    assert (model.config.dtype, model.config.param_dtype) == ("bfloat16", "bfloat16")
    exact = research.load(unbroken.workdir)
    assert (exact.config.dtype, exact.config.param_dtype) == ("float32", "float32")
    found = named_leaves(model.params)
    for name, leaf in named_leaves(exact.params).items():
        assert found[name].dtype == jnp.bfloat16
        rounded = np.asarray(leaf.astype(jnp.bfloat16))
        np.testing.assert_array_equal(np.asarray(found[name]), rounded, err_msg=name)
    if mesh is not None:
        kernel = found["layers_0/mlp/up/kernel"]
        assert kernel.sharding.device_set == set(jax.devices()[:4])


def test_logits_in_bfloat16_are_near_those_in_float32_and_others(unbroken: Unbroken):
    ids = [[1, 17, 42, 97, 3]]
    exact = research.load(unbroken.workdir).logits(ids)
    near = research.load(unbroken.workdir, dtype="bfloat16").logits(ids)
    assert 0 < np.abs(near - exact).max() < 0.02 * np.abs(exact).max()


def test_a_type_that_is_not_known_is_refused(unbroken: Unbroken, capsys):
    with pytest.raises(UserError, match=r"^dtype = 'float16' is not known\. Did you mean"):
        research.load(unbroken.workdir, dtype="float16")
    assert cli.main(["sample", f"--workdir={unbroken.workdir}", "--dtype=int4"]) == 2
    assert "--dtype = 'int4' is not known" in capsys.readouterr().err


def test_samples_are_drawn_in_the_type_of_the_flag(unbroken: Unbroken, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken.workdir, workdir)
    argv = ["sample", f"--workdir={workdir}", "--prompt=the", "--max_tokens=6", "--seed=3"]
    assert cli.main([*argv, "--dtype=bfloat16"]) == 0
    printed = capsys.readouterr().out
    model = research.load(workdir, dtype="bfloat16")
    [text] = model.generate(["the"], max_tokens=6, seed=3)
    assert printed == f"the{text.text}\n"


def broken_workdir(unbroken: Unbroken, folder):
    """A workdir whose model has a weight that is no number."""
    workdir = folder / "run"
    shutil.copytree(unbroken.workdir, workdir, ignore=shutil.ignore_patterns("checkpoints"))
    params = named_leaves(research.load(unbroken.workdir).params)
    name = "layers_1/mlp/down/kernel"
    params[name] = params[name].at[3, 2].set(np.nan)
    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in params.items()}
    parts = [(name, (), np.asarray(leaf)) for name, leaf in params.items()]
    write_params(workdir, 1, shapes, parts)
    return workdir


@pytest.mark.thorough
def test_debug_nans_names_the_weight_that_is_no_number(unbroken: Unbroken, tmp_path, capsys):
    workdir = broken_workdir(unbroken, tmp_path)
    where = "layers_1/mlp/down, where layers_1/mlp/down/kernel is nan at [3, 2]"
    for flags, named in (([], False), (["--debug_nans"], True), (["--num_beams=2"], False)):
        argv = ["sample", f"--workdir={workdir}", "--prompt=the", "--max_tokens=4", *flags]
        assert cli.main(argv) == 2
        said = capsys.readouterr().err
        assert "its logits are not numbers" in said
        assert (where in said) == named

    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "the"}\n')
    argv = ["generate", f"--workdir={workdir}", f"--in={source}", f"--out={tmp_path / 'out'}"]
    assert cli.main([*argv, "--max_tokens=4", "--debug_nans"]) == 0
    assert where in (tmp_path / "out").read_text()


def test_layers_that_are_stacked_are_loaded_one_by_one_for_guesses(unbroken: Unbroken, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken.workdir, workdir)
    config = json.loads((workdir / "config.json").read_text())
    config["model"]["layer_loop"] = "scan"
    (workdir / "config.json").write_text(json.dumps(config))
    stacked = research.load(workdir)
    loaded = research.load(workdir, unroll=True)
    assert stacked.params_digest == loaded.params_digest
    guessing = {"speculate": "first_layers", "draft_layers": 1}
    with pytest.raises(UserError, match="load the model with unroll = True"):
        stacked.engine(slots=2, tiles=(2,), **guessing)
    engine = loaded.engine(slots=2, tiles=(2,), **guessing)
    assert engine.serve.draft_layers == 1
