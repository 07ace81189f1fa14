"""The workdir describes itself: claim one for a run, read what it says."""

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import jax

from research.core import config as configs
from research.core.errors import UserError
from research.data.tokenizers import Tokenizer
from research.recipes.experiment import ExperimentConfig, completed
from research.storage import files
from research.storage.paths import Path, in_bucket, reason

logger = logging.getLogger("tessera")

# What may change when a run goes on: where and how long it runs, what is kept and shown. Nothing
# that it computes.
MAY_CHANGE = {
    "mesh": None,
    "distributed": None,
    "checkpoint": None,
    "train": {"steps", "log_every", "eval_every", "eval_batches", "max_skipped"},
    "data": {"workers", "prefetch"},
    "model": {"layer_loop", "remat"},
}
# Parts of a config whose fields are read one by one.
_GROUPS = ("model", "source", "train", "data")


def check(workdir: Path, config: ExperimentConfig) -> None:
    """Finds whether a run may have the workdir; nothing in it is changed.

    Raises:
      UserError: it belongs to another config, or cannot be written.
    """
    try:
        files.check_writable(workdir)
    except OSError as error:
        raise UserError("workdir", workdir, f"cannot be written: {reason(error)}.") from error
    if (workdir / "config.json").exists():
        held, wanted = completed(read_config(workdir)), configs.plain(config)
        difference = configs.first_difference(_fixed(held), _fixed(wanted))
        if difference is not None:
            raise UserError(
                "workdir",
                workdir,
                f"belongs to another config: {difference} is {_at(held, difference)} there, "
                f"{_at(wanted, difference)} here. Use another workdir, or delete this one.",
            )


def _at(values: Any, name: str) -> str:
    """Returns the value under a dotted name, as a message shows it."""
    for key in name.split("."):
        if key not in values:
            return "not set"
        values = values[key]
    return repr(values)


@contextlib.contextmanager
def claim(workdir: Path, config: ExperimentConfig, tokenizer: Tokenizer) -> Iterator[None]:
    """Makes a checked workdir this config's own, and this run's as long as the context lasts.

    Enter it when all else that a user can get wrong has been looked at.

    Raises:
      UserError: another run is at work there.
    """
    if jax.process_index() != 0:
        yield
        return
    files.make_folder(workdir)
    with _locked(workdir):
        write_config(workdir, config)
        tokenizer.save(workdir / "tokenizer")
        yield


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    """Holds the workdir's lock, which the system takes back from a process that dies. The file
    itself stays.
    """
    if in_bucket(workdir):
        logger.warning("%s: a bucket has no locks: nothing keeps a second run out", workdir)
        yield
        return
    with (workdir / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                "workdir", workdir, f"is in use: process {file.read()} trains there."
            ) from error
        except OSError as error:
            logger.warning("%s: %s: nothing keeps a second run out", file.name, error.strerror)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _fixed(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values that must not change in a workdir."""
    fixed = {}
    for name, group in values.items():
        if name not in MAY_CHANGE:
            fixed[name] = group
        elif MAY_CHANGE[name] is not None:
            fixed[name] = {
                key: value for key, value in group.items() if key not in MAY_CHANGE[name]
            }
    return fixed


def write_config(workdir: Path, config: Any) -> None:
    """Writes `config.json`, whole or not at all."""
    files.write_text(workdir / "config.json", configs.to_json(config))


def read_config(workdir: Path) -> dict[str, Any]:
    """Returns the plain config of a workdir.

    Raises:
      UserError: it is no workdir, or what must be a group of fields in its config is none.
    """
    try:
        values = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            "workdir", workdir, f"is not a workdir: config.json: {reason(error)}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError("workdir", workdir, f"is not a workdir: config.json: {error}.") from error
    if not isinstance(values, dict) or "model" not in values:
        raise UserError("workdir", workdir, "is not a workdir: its config.json holds no model.")
    for name in _GROUPS:
        if name in values and not isinstance(values[name], dict):
            raise UserError(
                name,
                values[name],
                "must be a group of fields.",
                origin=str(workdir / "config.json"),
            )
    if "source" in values and "model_type" not in values["source"]:
        raise UserError(
            "source.model_type", constraint="is missing.", origin=str(workdir / "config.json")
        )
    return values
