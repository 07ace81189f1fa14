"""Serves one bucket of Google Cloud Storage on this machine: `python -m tests.storage.emulator PORT
BUCKET`.

The emulator of the package index knows no generations, which TensorStore needs to write a store
that others write too: each object's own is told with its bytes, and a request that names another
    one is refused.
"""

import functools
import sys
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects


def _generation(storage: Any, bucket: str, name: str) -> int:
    try:
        return int(storage.get_file_obj(bucket, name)["generation"])
    except NotFound:
        return 0


def _conditional(handler: Callable[..., None]) -> Callable[..., None]:
    """Returns a handler that keeps a request's preconditions on the generation of its object, and
    tells it.
    """

    @functools.wraps(handler)
    def handle(request: Any, response: Any, storage: Any, *rest: Any, **more: Any) -> None:
        bucket = request.params["bucket_name"]
        name = (
            request.params["object_id"]
            if "object_id" in request.params
            else request.query.get("name", [""])[0]
        )
        generation = _generation(storage, bucket, name)
        (wanted,) = request.query.get("ifGenerationMatch", [generation])
        (known,) = request.query.get("ifGenerationNotMatch", [None])
        if int(wanted) != generation:
            response.status = HTTPStatus.PRECONDITION_FAILED
        elif known is not None and int(known) == generation:
            response.status = HTTPStatus.NOT_MODIFIED
        else:
            handler(request, response, storage, *rest, **more)
            response["x-goog-generation"] = str(_generation(storage, bucket, name))

    return handle


def main(port: int, bucket: str) -> None:
    """Serves until the process is killed."""
    for name in ("get", "download", "insert", "delete"):
        setattr(objects, name, _conditional(getattr(objects, name)))
    # Its table of handlers is made when it is imported.
    from gcp_storage_emulator import server

    server.create_server("127.0.0.1", port, in_memory=True, default_bucket=bucket).run()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
