"""What `import research` offers notebooks and scripts: the verbs as functions, with Python values
in and out.
"""

from collections.abc import Mapping
from typing import Any

from research.core import config as configs
from research.inspection.report import report_lines
from research.models.config import ModelConfig
from research.recipes import convert as converting
from research.recipes import describe as describing
from research.recipes import train as training
from research.recipes.experiment import ExperimentConfig, load_experiment
from research.recipes.load import load
from research.recipes.loaded import LoadedModel
from research.storage.paths import Path, as_path

__all__ = ["convert", "describe", "load", "train"]


def train(
    config: str | Mapping[str, Any] | ExperimentConfig,
    workdir: str | Path,
    overrides: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Trains to the last step, resuming from the newest checkpoint where there is one, and returns
    the model.

    Args:
      config: `FILE.py` or `FILE.py:ARG`, nested values, or the config itself.
      workdir: folder of the run.
      overrides: other values for some of its fields, by dotted name: `{"train.steps": 100}`.

    Raises:
      UserError: a config that does not fit the data, the devices or the workdir.
      Interrupted: a signal stopped the run; its state is saved.
    """
    # As on the command line, where values are text: {"train.steps": 100} -> ("train.steps", "100").
    changes = [(name, str(value)) for name, value in (overrides or {}).items()]
    if isinstance(config, str):
        experiment = load_experiment(config, changes)
    else:
        values = configs.override(configs.plain(config), changes)
        experiment = configs.bind(ExperimentConfig, values)

    folder = as_path(workdir, "workdir")
    training.train(experiment, folder)
    return load(folder)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    format: str | None = None,
    tokenizer: str | Path | None = None,
    dtype: str | None = None,
) -> Path:
    """Reads a model in any known form, writes it whole or not at all, and returns the folder that
    it made.

    Args:
      source: a Hugging Face folder, a llama2.c `.bin`, or a workdir.
      target: a folder that does not exist or is empty.
      format: None makes a workdir, `hf` a Hugging Face folder.
      tokenizer: the tokenizer's file or folder, where it is not beside the model.
      dtype: of the tensors of a Hugging Face folder; None is float32.

    Raises:
      UserError: a source that is no model, a target that holds something, or a tokenizer that does
          not fit.
    """
    tokenizer_path = None if tokenizer is None else str(tokenizer)
    converting.convert(str(source), str(target), format, tokenizer_path, dtype)
    return as_path(target, "target")


def describe(model: str | ModelConfig | ExperimentConfig | LoadedModel) -> str:
    """Returns the description of a model as text: its sizes, its layers, its parameters as a tree,
    and its costs.

    Args:
      model: `FILE.py` or `FILE.py:ARG`, a config, or a loaded model, of any size: no array is
          allocated.

    Raises:
      UserError: a config file that cannot be read.
    """
    return "\n".join(report_lines(_model_config(model)))


def _model_config(model: str | ModelConfig | ExperimentConfig | LoadedModel) -> ModelConfig:
    # A config file, a run's config, a loaded model, or the config itself.
    if isinstance(model, str):
        return describing.load_model(model, [])
    if isinstance(model, ExperimentConfig):
        return model.model
    if isinstance(model, LoadedModel):
        return model.config
    return model
