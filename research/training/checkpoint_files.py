"""One checkpoint on disk: arrays by Orbax, and a manifest that says what they must be.

    <step>/arrays/…                 OCDBT files, one tree of canonical arrays
    (models/layer_stack.py) <step>/manifest/manifest.json   format, step, the shape, type and digest
    of each array, extra; a sha256 of all that base-<digest>/arrays/…          arrays that several
    checkpoints share: frozen parameters (checkpoint_base.py)

Orbax checks neither that the bits it returns are the bits it was given nor that a file is the one
it wrote, so all of that is checked here, against the manifest, which guards itself by its own
sha256.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import Array

from research.core.errors import UserError
from research.core.trees import nested
from research.storage.digests import digests
from research.storage.paths import Path, in_bucket
from research.training import checkpoint_arrays, manifest_values

# 2 is 1 with arrays that lie in a folder beside the checkpoint, their `place`.
FORMATS = (1, 2)
ARRAYS, MANIFEST = "arrays", "manifest"
# How a folder of arrays that several checkpoints share is called.
FOLDER_DIGITS = 16
_SHARED_FOLDER = re.compile(f"base-[0-9a-f]{{{FOLDER_DIGITS}}}")
# What Orbax writes into a checkpoint when all else is in it.
COMMIT = "commit_success.txt"


class Damaged(Exception):
    """A checkpoint that is not what was written; the message names the array or file."""


def checkpointer(folder: Path) -> ocp.AsyncCheckpointer:
    """Returns the writer of checkpoints into a folder.

    On a disk each is written into a temporary folder, renamed to its final name when all is in it.
    In a bucket it is written in its place, and `COMMIT` last.
    """
    modes = ocp.options.AtomicityMode
    mode = modes.COMMIT_FILE if in_bucket(folder) else modes.ATOMIC_RENAME
    # Folders that Orbax makes in the background are waited for by all its threads, for 20 minutes
    # where the disk has
    # no room for one: the process would not end before.
    options = ocp.AsyncOptions(create_directories_asynchronously=False)
    handlers = {
        ARRAYS: _arrays_handler(),
        MANIFEST: ocp.JsonCheckpointHandler(filename="manifest.json"),
    }
    return ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(async_options=options), **handlers
        ),
        async_options=options,
        atomicity_options=ocp.options.AtomicityOptions(mode=mode),
    )


def is_complete(folder: Path) -> bool:
    """Whether a folder with a checkpoint's name is one; in a bucket it may be one that is being
    written.
    """
    if in_bucket(folder):
        return (folder / COMMIT).exists()
    return folder.is_dir()


def save_args(
    step: int, arrays: Mapping[str, Array], elsewhere: Mapping[str, Any], extra: Mapping[str, Any]
) -> ocp.args.Composite:
    """Returns what is to be written, digests included; every process must call this.

    Args:
      step: of the checkpoint.
      arrays: that it holds itself.
      elsewhere: what the manifest says of the others.
      extra: what else belongs to it.
    """
    manifest = build_manifest(
        step, describe_arrays(arrays, digests(arrays)) | dict(elsewhere), extra
    )
    return ocp.args.Composite(
        **{ARRAYS: ocp.args.PyTreeSave(nested(arrays)), MANIFEST: ocp.args.JsonSave(manifest)},
    )


def arrays_save_args(arrays: Mapping[str, Array]) -> ocp.args.Composite:
    """Returns what is to be written of arrays that checkpoints name in their manifests."""
    return ocp.args.Composite(**{ARRAYS: ocp.args.PyTreeSave(nested(arrays))})


def describe_arrays(
    arrays: Mapping[str, Any], digests_of: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Returns what a manifest says of arrays (or their shapes) with these digests."""
    return {
        name: {
            "shape": list(arrays[name].shape),
            "dtype": str(arrays[name].dtype),
            "digest": digest,
        }
        for name, digest in digests_of.items()
    }


def build_manifest(
    step: int, described: Mapping[str, Any], extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the manifest of arrays that are so described."""
    version = FORMATS[any("place" in array for array in described.values())]
    content = {
        "format": version,
        "step": step,
        "arrays": described,
        "extra": manifest_values.encode(extra),
    }
    content = json.loads(json.dumps(content))  # as it will be read: string keys, lists
    return {"sha256": _sha256(content), "content": content}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the content of a checkpoint's manifest.

    Raises:
      Damaged: it is missing, is not JSON, is not what was written, or is of another step than the
          folder's name says.
    """
    path = folder / MANIFEST / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        content = manifest["content"]
        good = manifest["sha256"] == _sha256(content)
        version, step = content["format"], content["step"]
    except FileNotFoundError:
        raise Damaged(f"{path.name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"{path.name} cannot be read ({_one_line(error)})") from error
    if not good:
        raise Damaged(f"{path.name} is not what was written (its sha256 differs)")
    if version not in FORMATS:
        raise UserError(
            f"{path}: format = {version} is unknown to this version, which reads up to "
            f"{FORMATS[-1]}."
        )
    if str(step) != folder.name:
        raise Damaged(f"{path.name} is of step {step}: the folder has been renamed")
    return content


def shared_folders_named(manifest: Mapping[str, Any]) -> frozenset[str]:
    """Returns the folders beside a checkpoint in which arrays of it lie."""
    return frozenset(array["place"] for array in manifest["arrays"].values() if "place" in array)


def shared_folder_name(digest: str) -> str:
    """Returns the name of the folder of arrays that together have a digest, a hexadecimal
    number.
    """
    return f"base-{digest[:FOLDER_DIGITS]}"


def shared_folders(checkpoints: Path) -> list[Path]:
    """Returns the folders of arrays that several checkpoints may share; a folder of another name is
    somebody else's.
    """
    return [path for path in checkpoints.glob("base-*") if _SHARED_FOLDER.fullmatch(path.name)]


def locate_array(folder: Path, manifest: Mapping[str, Any], name: str) -> tuple[Path, str]:
    """Returns the store in which an array of a checkpoint lies, and the array's name there.

    Raises:
      Damaged: the manifest names a place that is none.
    """
    place = manifest["arrays"][name].get("place")
    if place is None:
        return folder / ARRAYS, name
    if not _SHARED_FOLDER.fullmatch(place):
        raise Damaged(f"array {name} lies in {place!r}, which is no folder of frozen parameters")
    return folder.parent / place / ARRAYS, name.partition("/")[2]


def check_architecture(
    folder: Path,
    manifest: Mapping[str, Any],
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    whole: bool,
) -> None:
    """Raises UserError, naming the first array that differs, when a checkpoint holds other arrays
    than `wanted`.

    Where all that differs is the optimizer's, the message says so: the model is the same one.

    Args:
      folder: of the checkpoint, for the message.
      manifest: its content.
      wanted: canonical shapes.
      whole: whether arrays beyond the wanted ones are a difference too.
    """
    here = {name: _show(shape.shape, shape.dtype) for name, shape in wanted.items()}
    there = {
        name: _show(array["shape"], array["dtype"]) for name, array in manifest["arrays"].items()
    }
    names = dict.fromkeys([*here, *(there if whole else ())])
    different = [
        name for name in names if name not in here or name not in there or here[name] != there[name]
    ]
    if not different:
        return
    name = different[0]
    has = f"is {there[name]} in it" if name in there else "is not in it"
    wants = here.get(name, "no such array")
    differs = f"{name} {has}; the config wants {wants}"
    if all(name.startswith("opt_state/") for name in different):
        raise UserError(
            f"{folder} has this model's parameters, but its optimizer's state is grouped "
            "otherwise (by an older "
            "version, another optimizer or another train.trainable), so train cannot resume it: "
            f"{differs}."
        )
    raise UserError(f"{folder} is of another architecture: {differs}.")


def read_arrays(
    folder: Path, manifest: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, Array]:
    """Reads arrays in the shardings of `wanted`; their bits are not checked yet (`check_digests`).

    Raises:
      Damaged: an array cannot be read, or Orbax's account of the arrays is not that of the
          manifest.
    """
    # store -> the names there of all its arrays
    stores: dict[Path, set[str]] = {folder / ARRAYS: set()}
    # (store, field) -> wanted arrays by their name there: parameters and their average may be one
    # array on disk
    groups: dict[tuple[Path, str], dict[str, str]] = {}
    for name in manifest["arrays"]:
        store, stored = locate_array(folder, manifest, name)
        stores.setdefault(store, set()).add(stored)
        if name in wanted:
            groups.setdefault((store, name.partition("/")[0]), {})[stored] = name
    arrays = {}
    for store, names in stores.items():
        with _placed(folder, store):
            _check_account(store / "_METADATA", names)
    for (store, _), names in groups.items():
        with _placed(folder, store):
            read = checkpoint_arrays.read_arrays(
                store, {stored: wanted[name] for stored, name in names.items()}
            )
        arrays |= {names[stored]: array for stored, array in read.items()}
    return {name: arrays[name] for name in wanted}


@contextlib.contextmanager
def _placed(folder: Path, store: Path) -> Iterator[None]:
    """Has what is said of a damaged store begin with the folder that it lies in, where that is not
    the checkpoint's.
    """
    try:
        yield
    except (checkpoint_arrays.UnreadableArray, Damaged) as error:
        beside = "" if store.parent == folder else f"{store.parent.name}: "
        raise Damaged(f"{beside}{error}") from error


def _check_account(path: Path, wanted: set[str]) -> None:
    """Raises Damaged where the file by which Orbax finds arrays does not name those that the
    manifest names.

    Nothing here needs the file, but whoever else reads the checkpoint does.
    """
    try:
        tree = json.loads(path.read_bytes())["tree_metadata"]
        names = {
            "/".join(str(key["key"]) for key in entry["key_metadata"]) for entry in tree.values()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{ARRAYS}/{path.name} cannot be read ({_one_line(error)})") from error
    different = sorted(names ^ wanted)
    if different:
        raise Damaged(
            f"{ARRAYS}/{path.name} is not what was written (array {different[0]} is in one of it "
            "and manifest)"
        )


def check_digests(manifest: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """Raises Damaged when an array's bits are not those that were saved; every process must call
    this.
    """
    wrong = [
        name
        for name, digest in digests(arrays).items()
        if digest != manifest["arrays"][name]["digest"]
    ]
    if wrong:
        place = manifest["arrays"][wrong[0]].get("place")
        beside = "" if place is None else f"{place}: "
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise Damaged(
            f"{beside}the bits of array {wrong[0]}{more} are not those that were saved (digest)"
        )


def _arrays_handler() -> ocp.PyTreeCheckpointHandler:
    # Weights hardly compress, and the time that it takes is the training's.
    return ocp.PyTreeCheckpointHandler(use_compression=False)


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _show(shape: Iterable[int], dtype: Any) -> str:
    return f"{dtype}[{', '.join(map(str, shape))}]"


def _one_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    said, _, _ = f"{type(error).__name__}: {error}".partition(" [tensorstore_spec=")
    return " ".join(said.split())[:300]
