#!/usr/bin/env python3
"""Runs one command as several processes on this machine, joined by `jax.distributed`.

    python launch/local_pod.py -n 2 -- train --config=configs/pretrain/stdlib.py --workdir=runs/pod

Lines of process 0 are printed as they come; of the others only what they say before a failure. A
failure ends all; SIGTERM and Ctrl-C are handed on, so that all processes save and stop after the
same step.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

GRACE_SECONDS = 60
# Threads of XLA for CPU in each process. A collective between processes blocks one; with as few as
# this machine has cores, the collectives that it waits for might find none.
NUM_THREADS = 16


def free_port() -> int:
    """Returns a port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start(
    count: int, command: list[str]
) -> list[tuple[subprocess.Popen, "tempfile._TemporaryFileWrapper | None"]]:
    """Starts the processes, and a file for the output of each but the first."""
    coordinator = f"localhost:{free_port()}"
    environment = {"NPROC": str(NUM_THREADS), **os.environ}
    processes = []
    for index in range(count):
        flags = {
            "initialize": True,
            "coordinator": coordinator,
            "num_processes": count,
            "process_id": index,
        }
        overrides = [f"--config.distributed.{name}={value}" for name, value in flags.items()]
        output = tempfile.TemporaryFile("w+") if index else None  # noqa: SIM115, read when all have ended
        process = subprocess.Popen(
            [sys.executable, "-m", "research", *command, *overrides],
            stdout=output,
            stderr=output and subprocess.STDOUT,
            env=environment,
        )
        processes.append((process, output))
    return processes


def main() -> int:
    """Returns the first exit status that is not 0, or 0."""
    parser = argparse.ArgumentParser(usage="local_pod.py -n PROCESSES -- VERB --config=FILE.py …")
    parser.add_argument("-n", type=int, default=2, help="number of processes")
    parser.add_argument("command", nargs="+", help="a verb of tessera and its flags")
    arguments = parser.parse_args()
    if arguments.n < 1:
        parser.error(f"-n {arguments.n}: at least 1 process is needed")
    processes = start(arguments.n, arguments.command)

    def hand_on(number: int, frame: object) -> None:
        for process, _ in processes:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hand_on)
    deadline = float("inf")
    first_failure = 0
    while any(process.poll() is None for process, _ in processes):
        if not first_failure and any(process.poll() for process, _ in processes):
            first_failure = next(
                process.returncode for process, _ in processes if process.returncode
            )
            deadline = time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            hand_on(signal.SIGKILL, None)
        time.sleep(0.1)
    for index, (process, output) in enumerate(processes):
        if process.returncode and output is not None:
            output.seek(0)
            print(
                f"process {index} ended with status {process.returncode}:\n{output.read()[-4000:]}",
                file=sys.stderr,
            )
    return first_failure or next(
        (process.returncode for process, _ in processes if process.returncode), 0
    )


if __name__ == "__main__":
    sys.exit(main())
