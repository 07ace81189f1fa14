"""One checkpoint on disk: arrays by Orbax, and a manifest that says what they must be.

    <step>/arrays/…                 OCDBT store: canonical arrays (models/canonical_params.py)
    <step>/manifest/manifest.json   format, step, extra; shape, type and digest of each array; the
                                    sha256 of all that
    base-<digest>/arrays/…          frozen parameters that checkpoints share (checkpoint_frozen.py)

Orbax checks neither that the bits it returns are those that it was given, nor that a file is the
one that it wrote. Both are checked here, against the manifest, whose own sha256 protects it.
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
from research.training import checkpoint_arrays, manifest_values, orbax_tree

# 2 is 1 with arrays in a folder that checkpoints share.
FORMATS = (1, 2)
ARRAYS = "arrays"
MANIFEST = "manifest"
# What Orbax writes into a checkpoint when all else is in it.
COMMIT = "commit_success.txt"

# Manifest key of the shared folder that an array is in; "place" is the stored name of format 2.
SHARED_FOLDER_KEY = "place"
# The name of a shared folder: `base-` and the first digits of a digest.
FOLDER_DIGITS = 16
_SHARED_FOLDER = re.compile(f"base-[0-9a-f]{{{FOLDER_DIGITS}}}")


class Damaged(Exception):
    """A checkpoint that is not what was written; the message names the array or file."""


def checkpointer(folder: Path) -> ocp.AsyncCheckpointer:
    """Returns Orbax's writer of checkpoints into a folder.

    On a disk a checkpoint is written into a temporary folder, which is renamed when all is in it.
    In a bucket it is written under its final name, and `COMMIT` last.
    """
    modes = ocp.options.AtomicityMode
    mode = modes.COMMIT_FILE if in_bucket(folder) else modes.ATOMIC_RENAME

    # Where Orbax makes folders in the background, all its threads wait for them, for 20 minutes if
    # the disk is full, and the process does not end before.
    async_options = ocp.AsyncOptions(create_directories_asynchronously=False)
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(async_options=async_options),
        **{
            ARRAYS: _arrays_handler(),
            MANIFEST: ocp.JsonCheckpointHandler(filename="manifest.json"),
        },
    )
    return ocp.AsyncCheckpointer(
        handler,
        async_options=async_options,
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
    step: int, arrays: Mapping[str, Array], shared: Mapping[str, Any], extra: Mapping[str, Any]
) -> ocp.args.Composite:
    """Returns what Orbax is to write, digests included; every process must call this.

    Args:
      step: of the checkpoint.
      arrays: those in its own store.
      shared: the manifest's entries of arrays in shared folders.
      extra: JSON values and small arrays to keep with them.
    """
    own = describe_arrays(arrays, digests(arrays))
    manifest = build_manifest(step, own | dict(shared), extra)
    items = {ARRAYS: _save_in_chunks(arrays), MANIFEST: ocp.args.JsonSave(manifest)}
    return ocp.args.Composite(**items)


def arrays_save_args(arrays: Mapping[str, Array]) -> ocp.args.Composite:
    """Returns what Orbax is to write of arrays that checkpoints share."""
    return ocp.args.Composite(**{ARRAYS: _save_in_chunks(arrays)})


def _save_in_chunks(arrays: Mapping[str, Array]) -> ocp.args.PyTreeSave:
    # What reads a part of an array then holds little more than that in memory.
    chunks = ocp.SaveArgs(chunk_byte_size=checkpoint_arrays.CHUNK_BYTES)
    return ocp.args.PyTreeSave(nested(arrays), save_args=nested(dict.fromkeys(arrays, chunks)))


def describe_arrays(
    arrays: Mapping[str, Any], digests_of: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Returns a manifest's entries of arrays (or their shapes) with these digests."""
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
    """Returns the manifest of the arrays that `described` has entries of."""
    has_shared = any(SHARED_FOLDER_KEY in entry for entry in described.values())
    version = FORMATS[-1] if has_shared else FORMATS[0]
    content = {
        "format": version,
        "step": step,
        "arrays": described,
        "extra": manifest_values.encode(extra),
    }
    # As it will be read, with string keys and lists: the sha256 is of that.
    content = json.loads(json.dumps(content))
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
        version = content["format"]
        step = content["step"]
    except FileNotFoundError:
        raise Damaged(f"{path.name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"{path.name} cannot be read ({_root_cause(error)})") from error
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
    """Returns the names of the shared folders that a checkpoint has arrays in."""
    entries = manifest["arrays"].values()
    return frozenset(entry[SHARED_FOLDER_KEY] for entry in entries if SHARED_FOLDER_KEY in entry)


def shared_folder_name(digest: str) -> str:
    """Returns the name of the folder of arrays that together have this hexadecimal digest."""
    return f"base-{digest[:FOLDER_DIGITS]}"


def shared_folders(checkpoints: Path) -> list[Path]:
    """Returns the shared folders in a folder of checkpoints; other names are not ours."""
    return [path for path in checkpoints.glob("base-*") if _SHARED_FOLDER.fullmatch(path.name)]


def locate_array(folder: Path, manifest: Mapping[str, Any], name: str) -> tuple[Path, str]:
    """Returns the store that an array of a checkpoint is in, and the array's name there.

    `params/embed` -> (<step>/arrays, `params/embed`), or (base-<digest>/arrays, `embed`)

    Raises:
      Damaged: the manifest names a folder that is no shared folder.
    """
    shared = manifest["arrays"][name].get(SHARED_FOLDER_KEY)
    if shared is None:
        return folder / ARRAYS, name
    if not _SHARED_FOLDER.fullmatch(shared):
        raise Damaged(f"array {name} is in {shared!r}, which is no folder of frozen parameters")
    _, _, name_in_folder = name.partition("/")
    return folder.parent / shared / ARRAYS, name_in_folder


def first_field(manifest: Mapping[str, Any], fields: tuple[str, ...]) -> str:
    """Returns the first of some fields of a state that a checkpoint has, or else the last."""
    stored = {name.partition("/")[0] for name in manifest["arrays"]}
    for field in fields:
        if field in stored:
            return field
    return fields[-1]


def params_digest(manifest: Mapping[str, Any], field: str) -> bytes:
    """Returns a digest of the arrays of a field, from their names, shapes, types and digests: none
    of them is read, and where a checkpoint lies does not matter.
    """
    described = []
    for array, entry in sorted(manifest["arrays"].items()):
        of_field, _, name = array.partition("/")
        if of_field == field:
            described.append([name, entry["shape"], entry["dtype"], entry["digest"]])
    return bytes.fromhex(_sha256(described))


def check_architecture(
    folder: Path,
    manifest: Mapping[str, Any],
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    exact: bool,
) -> None:
    """Raises UserError, naming the first array that differs, when a checkpoint has other arrays.

    Where only the optimizer's arrays differ, the message says so: the model is the same.

    Args:
      folder: of the checkpoint, for the message.
      manifest: its content.
      wanted: canonical shapes.
      exact: whether arrays beyond the wanted ones are a difference too.
    """
    here = {name: _type_name(shape.shape, shape.dtype) for name, shape in wanted.items()}
    stored = {
        name: _type_name(entry["shape"], entry["dtype"])
        for name, entry in manifest["arrays"].items()
    }
    names = {**here, **stored} if exact else here
    different = [name for name in names if here.get(name) != stored.get(name)]
    if not different:
        return

    name = different[0]
    found = f"is {stored[name]} in it" if name in stored else "is not in it"
    difference = f"{name} {found}; the config wants {here.get(name, 'no such array')}"
    if all(name.startswith("opt_state/") for name in different):
        raise UserError(
            f"{folder} has this model's parameters, but its optimizer's state is grouped "
            "otherwise (by an older version, another optimizer or another train.trainable), so "
            f"train cannot resume it: {difference}."
        )
    raise UserError(f"{folder} is of another architecture: {difference}.")


def read_arrays(
    folder: Path, manifest: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, Array]:
    """Reads arrays in the shardings of `wanted`; their bits are not checked (`check_digests`).

    Raises:
      Damaged: an array cannot be read, or Orbax's description of a store is not that of the
          manifest.
    """
    check_trees(folder, manifest)
    # {(base-…/arrays, params): {embed: params/embed}}. Each field is read by itself: parameters and
    # their average may be one array on disk.
    groups: dict[tuple[Path, str], dict[str, str]] = {}
    for name in manifest["arrays"]:
        if name in wanted:
            store, stored_name = locate_array(folder, manifest, name)
            field, _, _ = name.partition("/")
            groups.setdefault((store, field), {})[stored_name] = name

    arrays = {}
    for (store, _), names in groups.items():
        shapes = {stored_name: wanted[name] for stored_name, name in names.items()}
        with as_damaged(folder, store):
            read = checkpoint_arrays.read_arrays(store, shapes)
        arrays |= {names[stored_name]: array for stored_name, array in read.items()}
    return {name: arrays[name] for name in wanted}


@contextlib.contextmanager
def as_damaged(folder: Path, store: Path) -> Iterator[None]:
    """Re-raises an unreadable store as Damaged, prefixed with its folder's name if it is shared."""
    try:
        yield
    except (checkpoint_arrays.UnreadableArray, Damaged) as error:
        prefix = "" if store.parent == folder else f"{store.parent.name}: "
        raise Damaged(f"{prefix}{error}") from error


def check_trees(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises Damaged where Orbax's description of a store is not that of the manifest."""
    # {<step>/arrays: {params/embed, …}, base-…/arrays: {embed, …}}
    stores: dict[Path, set[str]] = {folder / ARRAYS: set()}
    for name in manifest["arrays"]:
        store, stored_name = locate_array(folder, manifest, name)
        stores.setdefault(store, set()).add(stored_name)
    for store, stored_names in stores.items():
        with as_damaged(folder, store):
            _check_tree_metadata(store / orbax_tree.FILE, stored_names)


def _check_tree_metadata(path: Path, wanted: set[str]) -> None:
    """Raises Damaged where Orbax's description of a store does not name the manifest's arrays.

    Tessera does not need the file, but other readers of the checkpoint do.
    """
    try:
        names = orbax_tree.array_names(path.read_bytes())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{ARRAYS}/{path.name} cannot be read ({_root_cause(error)})") from error

    different = sorted(names ^ wanted)
    if different:
        raise Damaged(
            f"{ARRAYS}/{path.name} is not what was written (array {different[0]} is in one of it "
            "and manifest)"
        )


def check_digests(manifest: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """Raises Damaged when an array's bits are not those that were saved.

    Every process must call this.
    """
    compare_digests(manifest, digests(arrays))


def compare_digests(manifest: Mapping[str, Any], found: Mapping[str, str]) -> None:
    """Raises Damaged where the digest of an array is not that of what was saved."""
    entries = manifest["arrays"]
    wrong = [name for name, digest in found.items() if digest != entries[name]["digest"]]
    if not wrong:
        return

    shared = entries[wrong[0]].get(SHARED_FOLDER_KEY)
    prefix = "" if shared is None else f"{shared}: "
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    raise Damaged(
        f"{prefix}the bits of array {wrong[0]}{more} are not those that were saved (digest)"
    )


def _arrays_handler() -> ocp.PyTreeCheckpointHandler:
    # Weights hardly compress, and the time that it takes is the training's.
    return ocp.PyTreeCheckpointHandler(use_compression=False)


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _type_name(shape: Iterable[int], dtype: Any) -> str:
    """Returns such as `float32[8, 16]`."""
    return f"{dtype}[{', '.join(map(str, shape))}]"


def _root_cause(error: BaseException) -> str:
    """Returns the first error of a chain, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    message, _, _ = f"{type(error).__name__}: {error}".partition(" [tensorstore_spec=")
    return " ".join(message.split())[:300]
