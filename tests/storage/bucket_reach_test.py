"""A bucket that does not answer is one line: claims about `storage.paths` and what the command line
shows of it.
"""

import contextlib
import http.server
import threading
import time

import pytest

from research import cli
from research.storage import paths


class _Refusing(http.server.BaseHTTPRequestHandler):
    """Answers as Google's servers do to whoever has no credentials."""

    def do_GET(self):
        said = (
            b'{"error": {"code": 401, "message": "Anonymous caller does not have '
            b'storage.objects.list access"}}'
        )
        self.send_response(401)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *args):
        pass


class _Server(http.server.ThreadingHTTPServer):
    """Prints nothing about clients that hang up in the middle of a request, as ours do when they
    give up.
    """

    def handle_error(self, request, client_address):
        pass


@contextlib.contextmanager
def _server():
    with _Server(("127.0.0.1", 0), _Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def _free_port():
    with _Server(("127.0.0.1", 0), _Refusing) as server:
        return server.server_port


@pytest.fixture
def at_port(monkeypatch):
    """Sends the client of buckets to a port of this machine."""
    gcsfs = pytest.importorskip("gcsfs")

    def send(port):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        gcsfs.GCSFileSystem.clear_instance_cache()

    monkeypatch.setattr(paths, "_reached", set())
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    yield send
    gcsfs.GCSFileSystem.clear_instance_cache()


def _said(capfd):
    assert cli.main(["sample", "--workdir=gs://bucket/run", "--prompt=a"]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_bucket_whose_server_is_not_there_is_one_line_soon(at_port, capfd):
    at_port(_free_port())
    start = time.monotonic()
    error = _said(capfd)
    assert (
        "--workdir = 'gs://bucket/run': bucket gs://bucket cannot be reached: Connect call failed"
        in error
    )
    assert time.monotonic() - start < 30  # the client alone takes longer to give up


def test_a_bucket_that_wants_credentials_is_one_line(at_port, capfd):
    with _server() as port:
        at_port(port)
        error = _said(capfd)
    assert (
        "bucket gs://bucket cannot be reached: Anonymous caller does not have "
        "storage.objects.list access" in error
    )
