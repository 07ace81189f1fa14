"""A bucket without a cloud: an emulator of Google Cloud Storage on this machine."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

import pytest


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _wait_for(port: int, process: subprocess.Popen) -> None:
    for _ in range(600):
        assert process.poll() is None, "the emulator ended"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise AssertionError("the emulator does not answer")


@pytest.fixture(scope="session")
def emulator() -> Iterator[str]:
    """The address of the emulator's only bucket; all clients of this process and those that it
    starts go there.
    """
    port = _free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.storage.emulator", str(port), "emulated"],
        cwd=pathlib.Path(__file__).parent.parent.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(port, process)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STORAGE_EMULATOR_HOST", url)
            patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
            patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
            patch.setenv(
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false"
            )  # asks a service that the emulator has not
            yield "gs://emulated"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def bucket(emulator: str) -> str:
    """The address of a folder that no other test has."""
    assert os.environ["STORAGE_EMULATOR_HOST"].startswith("http://127.0.0.1:")
    return f"{emulator}/{uuid.uuid4().hex}"
