"""What `import research` offers: the verbs as functions, and nothing done by the import itself."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import research
from research.core.errors import UserError
from tests.recipes import runs
from tests.recipes.fixtures import Unbroken
from tests.tiny import tiny_config

IMPORT = """
import json, logging, sys
loggers = {name: list(logging.getLogger(name).filters) for name in ("absl", "asyncio", "jax")}
hooks = (sys.excepthook, sys.unraisablehook, sys.displayhook)
import research
light = not [name for name in ("jax", "numpy", "research.api") if name in sys.modules]
names = dir(research)
research.load
print(json.dumps({
    "light": light,
    "names": names,
    "filters": all(logging.getLogger(name).filters == filters for name, filters in loggers.items()),
    "handlers": logging.getLogger("tessera").handlers == [],
    "hooks": (sys.excepthook, sys.unraisablehook, sys.displayhook) == hooks,
}))
"""


def test_the_import_touches_nothing_of_others():
    printed = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True, cwd=runs.ROOT
    )
    found = json.loads(printed.stdout.splitlines()[-1])
    assert {"convert", "describe", "load", "train"} <= set(found.pop("names"))
    assert found == {"light": True, "filters": True, "handlers": True, "hooks": True}


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'serve'"):
        _ = research.serve


def test_a_run_is_resumed_and_returned_as_a_model(unbroken: Unbroken):
    model = research.train(str(unbroken.config), unbroken.workdir)
    assert model.step == runs.STEPS
    embedding = model.params["embed"]["embedding"]
    np.testing.assert_array_equal(embedding, unbroken.state.ema["embed"]["embedding"])


def test_overrides_reach_the_config(unbroken: Unbroken):
    with pytest.raises(UserError, match=r"optim\.learning_rate is 0\.01 there, 0\.5 here"):
        research.train(str(unbroken.config), unbroken.workdir, {"optim.learning_rate": 0.5})


def test_a_model_goes_out_and_comes_back(unbroken: Unbroken, tmp_path: pathlib.Path):
    there = research.convert(unbroken.workdir, tmp_path / "hf", format="hf")
    back = research.convert(there, tmp_path / "back")
    ours, theirs = research.load(unbroken.workdir), research.load(back)
    np.testing.assert_array_equal(
        ours.params["embed"]["embedding"], theirs.params["embed"]["embedding"]
    )


def test_a_model_is_described_from_a_config_a_file_and_itself(unbroken: Unbroken):
    model = research.load(unbroken.workdir)
    text = research.describe(model)
    assert text == research.describe(model.config) == research.describe(str(unbroken.config))
    assert "embed/embedding" in text
    assert text != research.describe(dataclasses.replace(tiny_config(), num_layers=7))
