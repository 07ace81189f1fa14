"""Local paths and addresses of buckets, behind one `Path`.

A local path is a `pathlib.Path`. `gs://bucket/folder` is an `etils.epath.Path`, which has the same
methods and uses fsspec's client of Google Cloud Storage. A bucket differs in three ways: objects
are written atomically, they cannot be appended to, and folders are only parts of names, so that
none is made, and none renamed atomically.
"""

import asyncio
import contextlib
import importlib.util
import os
import pathlib
import re
from typing import Any

from etils import epath

from research.core.errors import UserError

Path = pathlib.Path | epath.Path

# Seconds to wait for a bucket's server, and how often to ask it; the client itself tries for
# minutes.
REACH_SECONDS = 15
REACH_ATTEMPTS = 3
# The buckets that have answered to this process.
_reached: set[str] = set()

_ADDRESS = re.compile(r"[A-Za-z][\w+.-]*://")
_BUCKET = re.compile(r"gs://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])(/|$)")


def is_address(value: str) -> bool:
    """Whether a name is an address, such as `gs://bucket/run`, and not a local path."""
    return bool(_ADDRESS.match(value))


def as_path(value: str | Path, name: str = "path") -> Path:
    """Returns a folder or file, local or in a bucket, as a path.

    Args:
      value: a path, or its text.
      name: of the argument, for errors.

    Raises:
      UserError: an empty text, an address that is not of a bucket, or a bucket whose client is not
          installed or that does not answer.
    """
    if not isinstance(value, str):
        return value
    _check_not_empty(name, value)
    if not is_address(value):
        return pathlib.Path(value)
    if not value.startswith("gs://"):
        raise UserError(
            name, value, "is an address of an unknown kind. Use a folder, or gs://BUCKET/FOLDER."
        )
    if not _BUCKET.match(value):
        raise UserError(name, value, "names no bucket. Use gs://BUCKET/FOLDER.")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(
            name,
            value,
            "needs the client of Google Cloud Storage: pip install -c constraints.txt -e '.[gcs]'.",
        )
    _keep_no_listings()
    path = epath.Path(value)
    # Asked once per process: the client itself would try for minutes, and fail with a traceback.
    bucket = os.fspath(bucket_of(path))
    if bucket not in _reached:
        try:
            _reach(bucket, os.fspath(path))
        except Exception as error:  # the client raises errors of many types
            raise UserError(
                name, value, f": bucket {bucket} cannot be reached: {reason(error)}."
            ) from error
        _reached.add(bucket)
    return path


def in_bucket(path: Path) -> bool:
    """Whether a path is in a bucket."""
    return isinstance(path, epath.Path)


def absolute(path: Path) -> Path:
    """Returns a path that does not depend on the working directory; no address does."""
    return path if in_bucket(path) else path.absolute()


def bucket_of(path: Path) -> epath.Path:
    """Returns the bucket that a path is in."""
    assert in_bucket(path)
    # gs://bucket/run/1 -> ["gs:", "", "bucket"]
    parts = os.fspath(path).split("/", 3)[:3]
    return epath.Path("/".join(parts))


def kvstore(folder: Path) -> dict[str, Any]:
    """Returns TensorStore's description of a folder."""
    if not in_bucket(folder):
        return {"driver": "file", "path": f"{folder}/"}
    # gs://bucket/run/1 -> bucket, run/1/
    bucket, _, name = os.fspath(folder).removeprefix("gs://").partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": f"{name}/"}


def reason(error: BaseException) -> str:
    """Returns on one line why a file cannot be used, as the system or a bucket's client says it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # The client's own errors: the name alone, or no message.
    if isinstance(error, FileNotFoundError):
        return "No such file or directory"
    if isinstance(error, TimeoutError):
        return "no answer"
    return " ".join(str(error).split())[:300] or type(error).__name__


def _keep_no_listings() -> None:
    """Makes the client list a bucket each time: TensorStore and other machines write there too."""
    import fsspec

    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False


def _reach(bucket: str, path: str) -> None:
    """Raises the client's error where a bucket's server does not answer, or denies a path.

    Whether the bucket and the path exist is not checked.
    """
    import aiohttp
    import fsspec

    client = fsspec.filesystem("gs", finalize_on_close=True)  # the one that `epath` uses
    limit = aiohttp.ClientTimeout(total=REACH_SECONDS)

    # gs://bucket -> https://storage.googleapis.com/storage/v1/b/bucket; any status is an answer.
    url = f"{client.base}b/{bucket.removeprefix('gs://')}"

    async def ask() -> None:
        await client._set_session()
        for attempt in range(REACH_ATTEMPTS):
            try:
                async with client.session.get(url, timeout=limit):
                    return
            except (aiohttp.ClientError, TimeoutError):
                if attempt == REACH_ATTEMPTS - 1:
                    raise
            await asyncio.sleep(1)

    fsspec.asyn.sync(client.loop, ask)
    # The server answers: now as the user, with the client's own credentials. A path that does not
    # exist yet is no error.
    with contextlib.suppress(FileNotFoundError):
        fsspec.asyn.sync(client.loop, client._info, path, timeout=REACH_ATTEMPTS * REACH_SECONDS)


def local_path(flag: str, value: str) -> pathlib.Path:
    """Returns a folder or file of the command line as a path.

    Raises:
      UserError: it is empty, or an address, such as `gs://bucket/run`, which would become a local
          folder of that name.
    """
    _check_not_empty(flag, value)
    if is_address(value):
        raise UserError(
            flag, value, "is an address: here only local or mounted folders can be used."
        )
    return pathlib.Path(value)


def _check_not_empty(name: str, value: str) -> None:
    # "" would be the current folder: mostly a variable of the shell that is not set.
    if not value:
        raise UserError(name, value, "must not be empty.")
