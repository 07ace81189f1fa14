"""A workdir is served in the type that was asked for."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import research
from research import cli
from research.core.errors import UserError
from research.core.trees import named_leaves
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
