# PYTHON_ARGCOMPLETE_OK
"""`python -m research VERB` is `tessera VERB`: the process around the command line."""

import signal
import sys

from research.core import interrupts


def main() -> None:
    """Runs the command line and ends the process with its status."""
    interrupts.exit_at_once()
    # A slow import: it comes after the line above, which handles Ctrl-C.
    from research import cli

    cli.complete()
    status = cli.main()
    by_signal = status in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    by_stopped_run = status == cli.Interrupted.status and not _is_distributed()
    if by_signal or by_stopped_run:
        interrupts.exit_without_waiting(status)
    sys.exit(status)


def _is_distributed() -> bool:
    """Whether this is one process of many. The others then wait until it has left the group, which
    JAX does in `sys.exit`.
    """
    if "jax" not in sys.modules:
        return False
    return sys.modules["jax"].distributed.is_initialized()


if __name__ == "__main__":
    main()
