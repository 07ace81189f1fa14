"""`python -m research VERB` is `tessera VERB`: the process around the command line."""

import signal
import sys

from research.core import interrupts


def main() -> None:
    """Runs the command line and ends the process with its status."""
    interrupts.exit_at_once()
    from research import cli  # slow: Ctrl-C while it is imported is seen to already

    status = cli.main()
    signalled = status in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    if signalled or (status == cli.Interrupted.status and not _others_wait()):
        interrupts.exit_without_waiting(status)
    sys.exit(status)


def _others_wait() -> bool:
    """Whether this is one process of many: the others wait until it has said goodbye, as JAX does
    in `sys.exit`.
    """
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


if __name__ == "__main__":
    main()
