"""The workdir describes itself: `config.json`, and what of it a resumed run may change."""

import json
from typing import Any

from research.core import config as configs
from research.core.differences import first_difference
from research.core.errors import UserError
from research.recipes.experiment import ExperimentConfig, with_defaults
from research.storage import files
from research.storage.paths import Path, reason

# What may change when a run is resumed: where and how long it runs, what is kept and shown. What it
# computes is the same but for rounding, and for two things that follow the layout: which choices of
# tokens a full buffer of experts drops, and the dropout of models that are not cut into stages.
MAY_CHANGE = (
    "mesh",
    "distributed",
    "checkpoint",
    "trackers",
    "train.steps",
    "train.pipeline",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.max_skipped",
    "data.workers",
    "data.prefetch",
    "model.layer_loop",
    "model.remat",
    "model.sequence_parallel",
    "model.attention.exchange",
    "model.attention.implementation",
)
# Parts of a config whose fields are read one by one.
_GROUPS = ("model", "source", "train", "data")


def check(workdir: Path, config: ExperimentConfig) -> None:
    """Checks that a run may use the workdir; nothing in it is changed.

    Raises:
      UserError: it belongs to another config, or cannot be written.
    """
    try:
        files.check_writable(workdir)
    except OSError as error:
        raise UserError("workdir", workdir, f"cannot be written: {reason(error)}.") from error

    # A workdir of an earlier run belongs to its config.
    if (workdir / "config.json").exists():
        name = difference(workdir, config)
        if name is not None:
            stored = with_defaults(read_config(workdir))
            wanted = configs.plain(config)
            raise UserError(
                "workdir",
                workdir,
                f"belongs to another config: {name} is {_shown(stored, name)} there, "
                f"{_shown(wanted, name)} here. Use another workdir, or delete this one.",
            )


def difference(workdir: Path, config: ExperimentConfig) -> str | None:
    """Returns the dotted name of the first field that keeps a run of `config` from resuming that of
    the workdir, or None.
    """
    stored = with_defaults(read_config(workdir))
    return first_difference(_fixed(stored), _fixed(configs.plain(config)))


def _shown(values: Any, name: str) -> str:
    """Returns the value under a dotted name, as a message shows it."""
    # "train.steps" of {"train": {"steps": 5}} -> "5"
    for key in name.split("."):
        if key not in values:
            return "not set"
        values = values[key]
    return repr(values)


def _fixed(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values that must not change in a workdir."""
    # {"train": {"steps": 1, "seed": 2}, "mesh": …} -> {"train": {"seed": 2}}
    fixed = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if name in MAY_CHANGE:
            continue
        fixed[key] = _fixed(value, f"{name}.") if isinstance(value, dict) else value
    return fixed


def write_config(workdir: Path, config: Any) -> None:
    """Writes `config.json`, whole or not at all."""
    files.write_text(workdir / "config.json", configs.to_json(config))


def read_config(workdir: Path) -> dict[str, Any]:
    """Returns the plain config of a workdir.

    Raises:
      UserError: it is no workdir, or what must be a group of fields in its config is none.
    """
    path = workdir / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            "workdir", workdir, f"is not a workdir: config.json: {reason(error)}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError("workdir", workdir, f"is not a workdir: config.json: {error}.") from error

    # What its readers rely on: groups of fields, and whole ones.
    if not isinstance(values, dict) or "model" not in values:
        raise UserError("workdir", workdir, "is not a workdir: its config.json holds no model.")
    for name in _GROUPS:
        if name in values and not isinstance(values[name], dict):
            raise UserError(name, values[name], "must be a group of fields.", origin=str(path))
    if "source" in values and "model_type" not in values["source"]:
        raise UserError("source.model_type", constraint="is missing.", origin=str(path))
    return values
